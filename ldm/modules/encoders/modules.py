"""Encoders of conditions: captions, class labels, small images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer
from ldm.modules.encoders.clip_tokenizer import tokenizer_of
from ldm.modules.encoders.openclip import FrozenClipImageEmbedder, FrozenOpenCLIPEmbedder
from ldm.util import UserError

__all__ = [
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "SpatialRescaler",
]

SD_V1_ENCODER = "openai/clip-vit-large-patch14"
SD_V1_ARCHITECTURE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
# What CLIP's text encoders have in common; transformers' own defaults hold other numbers for the tokens.
COMMON = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


class FrozenCLIPEmbedder(nn.Module):
    """CLIP's text encoder (Radford et al., 2021): captions -> last states [B, max_length, hidden_size].

    Never asks a model hub for anything: the vocabulary comes with open_clip, the sizes from `architecture`
    (Stable Diffusion v1's when none is given), the weights from the checkpoint. State-dict keys are
    `transformer.text_model.*`, as in CompVis' checkpoints, whatever the installed transformers calls them.

    Args:
        version: the name that CompVis' yaml gives; any but the default needs an `architecture`.
        device: where the weights are made; the tokens go where the weights are.
        max_length: tokens of a caption, start and end among them.
        architecture: sizes, as transformers' CLIPTextConfig names them.
        freeze: no gradients.

    Raises:
        UserError: `architecture` is missing or does not describe a text encoder.
    """

    def __init__(
        self,
        version: str = SD_V1_ENCODER,
        device: str = "cpu",
        max_length: int = 77,
        architecture: Mapping[str, Any] | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        self.max_length = max_length
        self.transformer = CLIPTextModel(_text_config(version, max_length, architecture)).to(device)
        self.register_state_dict_post_hook(_write_compvis_names)
        self.register_load_state_dict_pre_hook(_read_compvis_names)
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """No gradients, eval mode."""
        self.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token numbers [B, max_length]: start, the caption's, end, and ends as padding.

        Of a caption longer than max_length - 2 tokens, the rest is cut off and shown in a warning.
        """
        tokenizer = tokenizer_of(self)
        return torch.tensor(tokenizer.rows(texts, self.max_length, tokenizer.end), dtype=torch.long)

    def forward(self, text: str | Sequence[str]) -> torch.Tensor:
        tokens = self.tokenize([text] if isinstance(text, str) else text)
        return self.transformer(input_ids=tokens.to(self.transformer.device)).last_hidden_state

    def encode(self, text: str | Sequence[str]) -> torch.Tensor:
        """The same as calling it."""
        return self(text)


def _text_config(version: str, max_length: int, architecture: Mapping[str, Any] | None) -> Any:
    from transformers import CLIPTextConfig

    where = "yaml: FrozenCLIPEmbedder"
    if architecture is None and version != SD_V1_ENCODER:
        raise UserError(f"{where}: version '{version}' needs `architecture:` (hidden_size and so on)")
    settings = COMMON | {"max_position_embeddings": max_length}
    settings |= SD_V1_ARCHITECTURE if architecture is None else architecture
    unknown = sorted(set(settings) - set(inspect.signature(CLIPTextConfig).parameters))
    if unknown:
        raise UserError(f"{where}: architecture: {', '.join(unknown)}: not in transformers' CLIPTextConfig")
    if settings["hidden_size"] % settings["num_attention_heads"]:
        raise UserError(f"{where}: architecture: num_attention_heads must divide hidden_size")
    if settings["max_position_embeddings"] < max_length:
        raise UserError(f"{where}: max_length {max_length} exceeds architecture.max_position_embeddings")
    return CLIPTextConfig(**settings, attn_implementation="sdpa")


def _write_compvis_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Saving: put back the `text_model.` level that transformers 5 has dropped."""
    old, new = f"{prefix}transformer.", f"{prefix}transformer.text_model."
    for key in [key for key in state if key.startswith(old) and not key.startswith(new)]:
        state[new + key.removeprefix(old)] = state.pop(key)


def _read_compvis_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Loading: keys with or without that level get the installed transformers' names; no `position_ids`."""
    level = "text_model." if hasattr(module.transformer, "text_model") else ""
    old, new = f"{prefix}transformer.", f"{prefix}transformer.{level}"
    for key in [key for key in state if key.startswith(old)]:
        value = state.pop(key)
        if not key.endswith("embeddings.position_ids"):
            state[new + key.removeprefix(old).removeprefix("text_model.")] = value


class ClassEmbedder(nn.Module):
    """Class labels [B] -> [B, 1, embed_dim].

    Args:
        embed_dim: width of the embeddings. n_classes: how many there are. key: the batch entry that holds the labels.
    """

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
    """Images [B, C, H, W] resized `n_stages` times by `multiplier`, then mapped to `out_channels`.

    Args:
        method: of the resizing: nearest, linear, bilinear, trilinear, bicubic or area.
        in_channels: C, needed with `out_channels`. bias: the map has one.
    """

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
