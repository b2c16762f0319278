"""OpenCLIP's encoders: captions of Stable Diffusion v2, and whole images as conditions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm.modules.encoders.clip_tokenizer import tokenizer_of
from ldm.util import UserError

UNREAD = ("logit_scale", "text_projection")  # of the text tower: in checkpoints, and needed for no picture
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that CLIP was trained on, in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def model_config(where: str, arch: str, architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sizes of one of open_clip's models: `architecture` itself, or what open_clip has under the name `arch`.

    Raises:
        UserError: open_clip has no such model.
    """
    import open_clip

    if architecture is not None:
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in architecture.items()}
    if arch not in open_clip.list_models():
        raise UserError(f"yaml: {where}: open_clip has no model '{arch}'; its names are like ViT-H-14")
    return open_clip.get_model_config(arch)


class FrozenOpenCLIPEmbedder(nn.Module):
    """OpenCLIP's text encoder (Cherti et al., 2023): captions -> states [B, max_length, width].

    Never asks a model hub for anything: sizes and vocabulary come with open_clip, the weights from the checkpoint.
    State-dict keys are `model.*`, as in Stable Diffusion v2's checkpoints; of those `logit_scale` and
    `text_projection` may be missing.

    Args:
        arch: open_clip's name of the model. version: of its weights, which are the checkpoint's.
        device: unused; the tokens go where the weights are.
        max_length: tokens of a caption, start and end among them.
        freeze: no gradients.
        layer: `last`, or `penultimate` as Stable Diffusion v2: without the last block, but with the last norm.
        architecture: sizes instead of `arch`, as open_clip writes them: embed_dim, quick_gelu, text_cfg (width, heads,
            layers, ...).

    Raises:
        UserError: arch, layer or architecture is wrong.
    """

    LAYERS = ("last", "penultimate")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str = "cpu",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        where = "yaml: FrozenOpenCLIPEmbedder"
        if layer not in self.LAYERS:
            raise UserError(f"{where}: layer: '{layer}' is none of {', '.join(self.LAYERS)}")
        self.max_length, self.layer, self.layer_idx = max_length, layer, self.LAYERS.index(layer)
        self.model = _text_tower(model_config("FrozenOpenCLIPEmbedder", arch, architecture), where)
        if max_length > self.model.context_length:
            raise UserError(f"{where}: max_length {max_length} exceeds the model's {self.model.context_length} tokens")
        self.register_load_state_dict_pre_hook(_forgive_unread)
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """No gradients, eval mode."""
        self.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token numbers [B, max_length]: start, the caption's, end, and zeros as padding.

        Of a caption longer than max_length - 2 tokens, the rest is cut off and shown in a warning.
        """
        return torch.tensor(tokenizer_of(self).rows(texts, self.max_length, pad=0), dtype=torch.long)

    def forward(self, text: str | Sequence[str]) -> torch.Tensor:
        tokens = self.tokenize([text] if isinstance(text, str) else text)
        return self.encode_with_transformer(tokens.to(self.model.positional_embedding.device))

    def encode_with_transformer(self, tokens: torch.Tensor) -> torch.Tensor:
        """States [B, N, width] of token numbers [B, N]."""
        tower, length = self.model, tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        blocks = tower.transformer.resblocks
        for block in blocks[: len(blocks) - self.layer_idx]:
            x = block(x, attn_mask=tower.attn_mask[:length, :length])
        return tower.ln_final(x)

    def encode(self, text: str | Sequence[str]) -> torch.Tensor:
        """The same as calling it."""
        return self(text)


def _text_tower(config: Mapping[str, Any], where: str) -> nn.Module:
    """The text half of an open_clip model, with the keys that it has in the whole."""
    from open_clip.transformer import QuickGELU, TextTransformer

    sizes = dict(config.get("text_cfg") or {})
    unknown = sorted(set(sizes) - set(inspect.signature(TextTransformer).parameters))
    if "embed_dim" not in config or unknown:
        what = (
            f"text_cfg.{unknown[0]}: open_clip's text encoder has no such thing" if unknown else "embed_dim is missing"
        )
        raise UserError(f"{where}: architecture: {what}")
    if sizes.get("width", 512) % sizes.get("heads", 8):
        raise UserError(f"{where}: architecture: text_cfg.heads must divide text_cfg.width")
    activation = QuickGELU if config.get("quick_gelu") else nn.GELU
    tower = TextTransformer(**sizes, output_dim=config["embed_dim"], act_layer=activation)
    tower.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))
    return tower


def _forgive_unread(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Loading: what no picture needs may be missing, and the mask that some checkpoints hold is computed."""
    state.pop(f"{prefix}model.attn_mask", None)
    for name in UNREAD:
        own = getattr(module.model, name)
        if any(key.startswith(f"{prefix}model.") for key in state):
            state.setdefault(f"{prefix}model.{name}", torch.zeros(own.shape, dtype=own.dtype))


class FrozenClipImageEmbedder(nn.Module):
    """CLIP's image encoder: images [B, 3, H, W] in [-1, 1] -> embeddings [B, embed_dim].

    State-dict keys are `model.*` of the whole CLIP, as in CompVis' checkpoints.

    Args:
        model: the name that CLIP gives it (ViT-L/14), or open_clip's (ViT-L-14).
        jit, device: unused; kept for yaml files that name them.
        antialias: blur before an image is made smaller.
        architecture: sizes instead of `model`, as open_clip writes them: embed_dim, quick_gelu, vision_cfg, text_cfg.

    Raises:
        UserError: there is no such model.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str = "cpu",
        antialias: bool = False,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        from open_clip import CLIP

        name = model.replace("/", "-").replace("@", "-").removesuffix("px")
        arch = f"{name}-quickgelu" if "/" in model else name  # OpenAI's own weights have the quick kind
        config = model_config("FrozenClipImageEmbedder", arch, architecture)
        try:
            self.model = CLIP(**config)
        except TypeError as error:
            raise UserError(f"yaml: FrozenClipImageEmbedder: architecture: {error}") from error
        self.antialias = antialias
        self.register_buffer("mean", torch.tensor(CLIP_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD), persistent=False)
        self.eval().requires_grad_(False)

    def preprocess(self, x: torch.Tensor) -> torch.Tensor:
        """Images of any size in [-1, 1] as CLIP takes them: resized (not cropped), normalised."""
        import kornia

        size = tuple(self.model.visual.image_size)
        x = kornia.geometry.resize(x, size, interpolation="bicubic", align_corners=True, antialias=self.antialias)
        return kornia.enhance.normalize((x + 1.0) / 2.0, self.mean.to(x), self.std.to(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(self.preprocess(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The embedding as one token for cross-attention, [B, 1, embed_dim]."""
        return self(x)[:, None]
