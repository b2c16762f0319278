"""Attention over image positions and over a context: the transformer blocks of the Stable Diffusion U-Net."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.adapters import AdaptableBlock
from ldm.modules.diffusionmodules.util import checkpoint, normalization, zero_module
from ldm.modules.tiling import attention


class GEGLU(nn.Module):
    """Linear layer with a GELU gate (Shazeer, 2020): [..., dim_in] -> [..., dim_out]."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The position-wise network of a transformer block: [B, N, dim] -> [B, N, dim_out or dim]."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = dim * mult
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of [B, N, query_dim] over a context [B, M, context_dim], by default itself."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        context_dim = context_dim or query_dim
        self.heads = heads
        self.slice_size: int | None = None
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attention(q, k, v, self.slice_size).transpose(1, 2).flatten(2))


class BasicTransformerBlock(AdaptableBlock):
    """Self-attention, cross-attention and feed-forward, each with its norm and residual.

    Its announced positions are those of the adapter paper (Xiang et al., 2023, fig. 2).
    """

    positions = ("attn1i", "attn1o", "attn2i", "attn2c", "attn2o", "ffni", "ffno", "transo")

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.checkpoint = checkpoint
        self.widths = dict.fromkeys(self.positions, dim) | {"attn2c": context_dim}

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, N, dim], context [B, M, context_dim] -> [B, N, dim]."""
        return checkpoint(self._forward, x, context, enabled=self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        at = self.announcer()
        attn1i = at("attn1i", x)
        attn1o = at("attn1o", self.attn1(self.norm1(attn1i)))
        attn2i = at("attn2i", attn1o + attn1i)
        attn2c = at("attn2c", context)
        attn2o = at("attn2o", self.attn2(self.norm2(attn2i), attn2c))
        ffni = at("ffni", attn2o + attn2i)
        ffno = at("ffno", self.ff(self.norm3(ffni)))
        return at("transo", ffno + ffni)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of an image, between two projections, with a residual around all.

    `use_linear` projects with linear layers, as Stable Diffusion v2 does, instead of 1x1 convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        self.use_linear = use_linear
        self.norm = normalization(in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout=dropout, context_dim=context_dim, checkpoint=use_checkpoint
            )
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, C, H, W], context [B, M, context_dim] -> [B, C, H, W]."""
        h, w = x.shape[-2:]
        tokens = self.norm(x)
        if not self.use_linear:
            tokens = self.proj_in(tokens)
        tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
        if self.use_linear:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.use_linear:
            tokens = self.proj_out(tokens)
        image = tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)
        if x.is_contiguous():  # one copy here, or every convolution after this one makes its own
            image = image.contiguous()
        if not self.use_linear:
            image = self.proj_out(image)
        return image + x
