"""The transformer that encodes captions and layouts in latent diffusion (Rombach et al., 2022, appendix E.2.1).

State-dict keys are those of the x-transformers library of 2021, which the published models were trained with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class AbsolutePositionalEmbedding(nn.Module):
    """A trained vector a place: [1, N, dim] for N tokens."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.emb(torch.arange(x.shape[1], device=x.device))[None]


class Attention(nn.Module):
    """Multi-head self-attention [B, N, dim] -> [B, N, dim], whose heads need not add up to dim."""

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The position-wise network [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(mult * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """`depth` times attention and feed-forward, each after its norm and with a residual: [B, N, dim] -> the same."""

    def __init__(self, dim: int, depth: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.dim = dim
        layers = [layer for _ in range(depth) for layer in (Attention(dim, heads, dim_head), FeedForward(dim))]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), layer]) for layer in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class TransformerWrapper(nn.Module):
    """Tokens [B, N] -> their encodings [B, N, dim], or logits over the vocabulary [B, N, num_tokens]."""

    def __init__(self, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0) -> None:
        super().__init__()
        dim = attn_layers.dim
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(self, x: torch.Tensor, return_embeddings: bool = False) -> torch.Tensor:
        x = self.emb_dropout(self.token_emb(x) + self.pos_emb(x))
        x = self.norm(self.attn_layers(x))
        return x if return_embeddings else self.to_logits(x)
