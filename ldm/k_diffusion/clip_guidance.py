"""Samples of an unconditional model, led towards a text by CLIP (Radford et al., 2021) as k-diffusion leads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.k_diffusion.denoiser import each
from ldm.k_diffusion.steps import Model
from ldm.modules.encoders.openclip import CLIP_MEAN, CLIP_STD

CONFIG = "open_clip_config.json"  # what makes a folder one of open_clip's
HUB = "hf-hub:"


class ClipModel:
    """One of open_clip's models: texts and images as points of the unit sphere.

    Raises:
        UserError: there is no such model, or its weights are nowhere or another's.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], torch.Tensor], device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval().requires_grad_(False), tokenizer, device
        size = model.visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = (
            torch.tensor(numbers, device=device).view(3, 1, 1)
            for numbers in (model.visual.image_mean or CLIP_MEAN, model.visual.image_std or CLIP_STD)
        )

    @classmethod
    def load(cls, name: str, weights: str | None, device: torch.device) -> ClipModel:
        """The model `name`, see `check`."""
        check(name, weights)
        import open_clip

        known = f"local-dir:{name}" if Path(name).is_dir() else name
        try:
            model = open_clip.create_model(known, pretrained=weights, require_pretrained=True)
        except Exception as error:  # torch, safetensors, the hub's client raise many types
            source = weights or name
            unsafe = "it holds other things than weights" if isinstance(error, UnpicklingError) else None
            reason = unsafe or " ".join(str(error).split())[:160]
            raise UserError(f"--clip_weights: '{source}' cannot be read as {name}'s: {reason}") from error
        return cls(model, open_clip.get_tokenizer(known), device)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D] of unit length."""
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float(), dim=-1)

    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        """[B, D] of unit length, of images [B, 1 or 3, H, W] in [-1, 1] of any size, squeezed into CLIP's."""
        images = (images.float().expand(-1, 3, -1, -1) + 1) / 2
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return F.normalize(self.model.encode_image((images - self.mean) / self.std).float(), dim=-1)

    @torch.no_grad()
    def similarity(self, images: torch.Tensor, text: str) -> torch.Tensor:
        """[B], the cosines between whole images [B, 1 or 3, H, W] in [-1, 1] and a text."""
        return self.of_images(images) @ self.of_texts([text])[0]


def check(name: str, weights: str | None) -> None:
    """Raise UserError, before anything is built, for a CLIP that cannot be had.

    Args:
        name: open_clip's (ViT-B-32); a folder with open_clip_config.json and weights; or `hf-hub:OWNER/MODEL`.
        weights: of one of open_clip's names: a file, or a tag of those that open_clip downloads.
    """
    if Path(name).is_dir() or name.startswith(HUB):
        if weights is not None:
            raise UserError(f"--clip_weights: '{name}' has its own weights; leave the flag out")
        if not name.startswith(HUB) and not (Path(name) / CONFIG).is_file():
            raise UserError(f"--clip_model: '{name}' has no {CONFIG}; it is no folder of open_clip's")
        return
    if os.sep in name:
        raise UserError(f"--clip_model: there is no folder '{name}'; on the hub it is {HUB}OWNER/MODEL")
    import open_clip

    if name not in open_clip.list_models():
        raise UserError(f"--clip_model: open_clip has no model '{name}'; its names are like ViT-B-32, or name a folder")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    if weights is None:
        raise UserError(f"--clip_weights: needs a file with {name}'s weights, or a tag to download them by: {tags}")
    if not Path(weights).is_file() and not open_clip.get_pretrained_cfg(name, weights):
        raise UserError(f"--clip_weights: there is no file '{weights}', and of {name} open_clip's tags are {tags}")


def spherical_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Half the square of the angle between points of the unit sphere [..., D]."""
    return 2 * ((a - b).norm(dim=-1) / 2).arcsin() ** 2


@dataclass(frozen=True)
class Cutouts:
    """Views of a picture that must all look like the text: the whole, and squares of it, each a new one every time.

    Args:
        count: views of a picture. least: the smallest side of a square, as a share of the picture's shorter one.
    """

    count: int = 8
    least: float = 0.5

    def __call__(
        self, images: torch.Tensor, generators: Sequence[torch.Generator], size: Sequence[int]
    ) -> torch.Tensor:
        """[count * B, C, *size] of images [B, C, H, W]: the views of the first, of the second, ..."""
        views = []
        for image, generator in zip(images, generators, strict=True):
            views += [image, *(self.square(image, generator) for _ in range(self.count - 1))]
        resized = [F.interpolate(view[None], tuple(size), mode="bicubic", antialias=True) for view in views]
        return torch.cat(resized)

    def square(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random square of an image [C, H, W]."""
        height, width = image.shape[1:]
        share, down, across = torch.rand(3, generator=generator, device=generator.device).tolist()
        side = max(1, round(min(height, width) * (self.least + (1 - self.least) * share)))
        top, left = round(down * (height - side)), round(across * (width - side))
        return image[:, top : top + side, left : left + side]


@dataclass
class ClipGuidance:
    """D(x, sigma) + sigma^2 times the gradient, by x, of -scale * the spherical distance of D's views to the text.

    That is the denoised mean of the density times exp(-scale * distance) (Dhariwal & Nichol, 2021, section 4.1, in
    k-diffusion's terms).

    Args:
        model: D(x, sigma), through which gradients flow.
        scale: 0 for the model alone.
        decode: from what the model denoises to images in [-1, 1].
        limit: values are held within +- this, as pixels are; None for latents.
        generators: one a picture, for its cutouts.
    """

    model: Model
    clip: ClipModel
    text: str
    scale: float
    generators: Sequence[torch.Generator]
    cutouts: Cutouts = field(default_factory=Cutouts)
    decode: Callable[[torch.Tensor], torch.Tensor] = torch.nn.Identity()
    limit: float | None = 1.0

    def __post_init__(self) -> None:
        self.target = self.clip.of_texts([self.text])

    def distances(self, denoised: torch.Tensor) -> torch.Tensor:
        """[B], the mean over a picture's views."""
        views = self.cutouts(self.decode(denoised), self.generators, self.clip.size)
        return spherical_distance(self.clip.of_images(views), self.target).view(len(denoised), -1).mean(1)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **condition: object) -> torch.Tensor:
        """The denoised x [B, ...], led."""
        if self.scale == 0:
            denoised = self.model(x, sigma, **condition)
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                denoised = self.model(x, sigma, **condition)
                slope = torch.autograd.grad(self.distances(denoised).sum(), x)[0]
            denoised = denoised.detach() - self.scale * each(sigma, x) ** 2 * slope
        return denoised if self.limit is None else denoised.clamp(-self.limit, self.limit)
