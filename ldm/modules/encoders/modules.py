"""Encoders of conditions: captions, class labels, small images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.encoders.clip_tokenizer import clip_tokenizer
from ldm.util import UserError

# openai/clip-vit-large-patch14, Stable Diffusion v1's text encoder.
CLIP_VIT_LARGE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
PREFIX = "transformer.text_model."


class FrozenCLIPEmbedder(nn.Module):
    """CLIP's text encoder: captions -> [B, max_length, hidden_size], the last layer after its norm.

    Never asks a model hub for anything: the vocabulary comes with open_clip, the sizes from `architecture`
    (Stable Diffusion v1's when none is given), the weights from the checkpoint. State-dict keys are
    `transformer.text_model.*`, as in CompVis' checkpoints.

    Args:
        version: the name that CompVis' yaml gives; only openai/clip-vit-large-patch14 needs no `architecture`.
        architecture: sizes, as transformers' CLIPTextConfig names them.
        freeze: no gradients and always in eval mode.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str = "cpu",
        max_length: int = 77,
        architecture: Mapping[str, Any] | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        if architecture is None and version != "openai/clip-vit-large-patch14":
            raise UserError(f"yaml: FrozenCLIPEmbedder: version '{version}' needs its `architecture:` (sizes) beside it")
        settings = {"hidden_act": "quick_gelu", "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
        settings |= {"max_position_embeddings": max_length} | dict(architecture or CLIP_VIT_LARGE)
        try:
            config = CLIPTextConfig(**settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"yaml: FrozenCLIPEmbedder: architecture: {error}") from error
        config._attn_implementation = "sdpa"
        self.transformer = CLIPTextModel(config)
        self.max_length = max_length
        self._register_state_dict_hook(_write_compvis_names)
        self._register_load_state_dict_pre_hook(_read_compvis_names, with_module=True)
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """No gradients, eval mode."""
        self.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token numbers [B, max_length]: start, at most max_length - 2 tokens, end, then ends as padding."""
        tokenizer = clip_tokenizer()
        rows = []
        for text in texts:
            numbers = tokenizer.encode(text)
            room = self.max_length - 2
            if len(numbers) > room:
                warnings.warn(
                    f"the prompt has {len(numbers)} tokens, {room} are used; cut off: '{tokenizer.decode(numbers[room:])}'",
                    stacklevel=2,
                )
            row = [tokenizer.start, *numbers[:room]]
            rows.append(row + [tokenizer.end] * (self.max_length - len(row)))
        return torch.tensor(rows)

    def forward(self, text: str | Sequence[str]) -> torch.Tensor:
        texts = [text] if isinstance(text, str) else list(text)
        tokens = self.tokenize(texts).to(next(self.transformer.parameters()).device)
        return self.transformer(input_ids=tokens).last_hidden_state

    def encode(self, text: str | Sequence[str]) -> torch.Tensor:
        """The same as calling it."""
        return self(text)


def _write_compvis_names(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """transformers 5 has no `text_model.` level: put it back in what is saved."""
    old, new = f"{prefix}transformer.", prefix + PREFIX
    for key in [k for k in state if k.startswith(old) and not k.startswith(new)]:
        state[new + key.removeprefix(old)] = state.pop(key)


def _read_compvis_names(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    """Give what is loaded the names of the installed transformers; `position_ids` is computed, not loaded."""
    has_level = any(name.startswith("text_model.") for name, _ in module.transformer.named_parameters())
    for key in [k for k in state if k.startswith(prefix + PREFIX)]:
        value = state.pop(key)
        if not key.endswith("position_ids"):
            rest_of_key = key.removeprefix(prefix + PREFIX)
            state[f"{prefix}transformer.{'text_model.' if has_level else ''}{rest_of_key}"] = value


class ClassEmbedder(nn.Module):
    """Class labels [B] -> [B, 1, embed_dim]; `key` names them in a batch."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Any, key: str | None = None) -> torch.Tensor:
        labels = batch[key or self.key] if isinstance(batch, Mapping) else batch
        labels = torch.as_tensor(labels, device=self.embedding.weight.device)
        return self.embedding(labels[:, None])


class SpatialRescaler(nn.Module):
    """Images [B, C, H, W] made smaller `n_stages` times by `multiplier`, then mapped to `out_channels` if given."""

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if method not in self.METHODS:
            raise UserError(f"yaml: SpatialRescaler: method: '{method}' is none of {', '.join(self.METHODS)}")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.remap_output = out_channels is not None
        if self.remap_output:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if self.remap_output else x

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The same as calling it."""
        return self(x)
