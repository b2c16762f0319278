"""A loaded model, of pixels or latents, trained here or wrapped, as a denoiser; and the way from pictures and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.errors import UserError
from ldm.k_diffusion.external import CompVisDenoiser, CompVisVDenoiser
from ldm.k_diffusion.training import KarrasDiffusion
from ldm.loading import Geometry
from ldm.modules.encoders.modules import ClassEmbedder, FrozenClipImageEmbedder, SpatialRescaler

WRAPPERS = {"eps": CompVisDenoiser, "v": CompVisVDenoiser}  # by what a model of discrete timesteps predicts


class LoadedModel:
    """D(x, sigma) of what `ldm.loading.load_model` gives, for x [B, *shape]: pictures, or an autoencoder's latents.

    Attributes:
        shape: of x, without the batch. size: (height, width) of the pictures in pixels.
        sigma_min, sigma_max: the noise levels that the model was trained between.
        of_latents: x are latents, not pixels.

    Raises:
        UserError: the model predicts something else than the noise or v.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first_stage = getattr(model, "first_stage_model", None)
        self.of_latents = self.first_stage is not None
        if isinstance(model, KarrasDiffusion):
            self.denoiser, self.sigma_min, self.sigma_max = model.model, model.sigma_min, model.sigma_max
        elif getattr(model, "parameterization", None) in WRAPPERS:
            self.denoiser = WRAPPERS[model.parameterization](model).to(model.device)
            self.sigma_min, self.sigma_max = float(self.denoiser.sigma_min), float(self.denoiser.sigma_max)
        else:
            predicted = getattr(model, "parameterization", None) or type(model).__name__
            raise UserError(f"yaml: parameterization: {predicted}: as a denoiser a model must predict eps or v")
        if self.of_latents:
            geometry = Geometry.of(model)
            self.size = geometry.height, geometry.width
            self.shape = geometry.channels, *(side // geometry.factor for side in self.size)
        else:
            sides = model.image_size
            self.size = (sides, sides) if isinstance(sides, int) else tuple(sides)
            self.shape = model.channels, *self.size

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **condition: Any) -> torch.Tensor:
        """The denoised x."""
        return self.denoiser(x, sigma, **condition)

    @property
    def unconditional(self) -> bool:
        """Whether nothing leads the model."""
        return isinstance(self.model, KarrasDiffusion) or self.model.model.conditioning_key is None

    def condition(self, count: int, caption: str = "", label: int | None = None) -> Mapping[str, Any]:
        """What `__call__` is told beside x and sigma for `count` samples: nothing, a caption or a class.

        Raises:
            UserError: the model is led by something else or by nothing, or has no such class.
        """
        if self.unconditional:
            if caption or label is not None:
                raise UserError("--caption, --class: nothing leads this model; leave them out")
            return {}
        key, encoder = self.model.model.conditioning_key, self.model.cond_stage_model
        if key in ("concat", "hybrid") or isinstance(encoder, SpatialRescaler | FrozenClipImageEmbedder):
            raise UserError(f"this model is led by an image ({self.model.cond_stage_key}), which cannot be given here")
        if not isinstance(encoder, ClassEmbedder):
            if label is not None:
                raise UserError("--class: this model is led by text; give a --caption")
            return {"cond": self.model.get_learned_conditioning([caption] * count)}
        if caption:
            raise UserError("--caption: this model is led by a class; give its number with --class")
        if label is None or not 0 <= label < encoder.n_classes:
            raise UserError(f"--class: this model is led by a class; give one of 0 to {encoder.n_classes - 1}")
        return {"cond": self.model.get_learned_conditioning([label] * count)}

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """x for images [B, 3, H, W] in [-1, 1]: their latents' means, or themselves (grey where the model is)."""
        if not self.of_latents:
            return images.mean(1, keepdim=True) if self.shape[0] == 1 else images
        encoded = self.model.encode_first_stage(images)
        return self.model.scale_factor * (encoded if isinstance(encoded, torch.Tensor) else encoded.mode())

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] of about [-1, 1] for x, through which gradients can flow."""
        return self.model.decode_first_stage(x) if self.of_latents else x
