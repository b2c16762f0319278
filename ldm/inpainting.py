"""Drawing inside a mask: the part of an image that stays, in pixels, in latents and beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from ldm.drawing import Batch
from ldm.images import as_tensor, on_white
from ldm.loading import Geometry
from ldm.precision import dtype_of
from ldm.util import UserError

HALF = 128  # a mask's grey from which on a pixel is redrawn


@dataclass(frozen=True)
class KnownRegion:
    """An RGB image and the pixels of it that are to be redrawn.

    Args:
        hole: [H, W], true where the image is redrawn.
    """

    image: Image.Image
    hole: np.ndarray

    @classmethod
    def of(
        cls, image: Image.Image, mask: Image.Image, height: int | None = None, width: int | None = None
    ) -> KnownRegion:
        """From what people bring: any kind of image, and a mask of the same size, white where it is redrawn.

        Raises:
            UserError: the sizes differ, or the mask has no white.
        """
        image, mask = on_white(image), _grey(mask)
        if image.size != mask.size:
            (w, h), (mask_w, mask_h) = image.size, mask.size
            raise UserError(f"mask: it has {mask_w}x{mask_h} pixels and the image {w}x{h}; they must be the same")
        size = (width or image.width, height or image.height)
        if size != image.size:
            image, mask = image.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.NEAREST)
        hole = np.asarray(mask) >= HALF
        if not hole.any():
            raise UserError("mask: it is black, so there is nothing to redraw; make that white which is to change")
        return cls(image, hole)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.hole.shape

    def paste(self, drawn: Image.Image) -> Image.Image:
        """`drawn`, which may be larger to the right and below, inside the mask, and the image itself elsewhere."""
        height, width = self.size
        return Image.composite(drawn.crop((0, 0, width, height)), self.image, Image.fromarray(self.hole))

    def padded(self, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image [1, 3, H', W'] in [-1, 1] and mask [1, 1, H', W'] (1 is redrawn), sides multiples of `multiple`."""
        below, right = (-side % multiple for side in self.size)
        pixels = np.pad(np.asarray(self.image), ((0, below), (0, right), (0, 0)), mode="edge")
        hole = np.pad(self.hole, ((0, below), (0, right)))
        return as_tensor(pixels), torch.from_numpy(hole.astype(np.float32))[None, None]


def _grey(mask: Image.Image) -> Image.Image:
    """A mask of any kind in shades of grey; transparent places are black."""
    mask = ImageOps.exif_transpose(mask).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("L")


def extra_channels(model: nn.Module) -> int:
    """How many channels a model's network takes beside its latents."""
    return getattr(model.model.diffusion_model, "in_channels", model.channels) - model.channels


def draw_inside(batch: Batch, known: KnownRegion, geometry: Geometry, strength: float) -> torch.Tensor:
    """Latents of a batch of pictures that go on where the mask ends."""
    pixels, mask = (part.to(batch.model.device) for part in known.padded(geometry.multiple))
    size = tuple(side // geometry.factor for side in mask.shape[2:])
    noise = batch.noise((geometry.channels, *size))
    if extra_channels(batch.model):
        batch = batch.beside(beside_latents(batch, pixels, mask, size))
        if strength == 1.0:
            return batch.from_noise(noise)
        return batch.from_image(batch.latents(pixels), noise, strength)
    x_start = batch.latents(pixels)
    keep = 1.0 - F.adaptive_max_pool2d(mask, size)  # a latent stays when all of its pixels stay
    region = {"mask": keep, "x0": x_start}
    if strength == 1.0:
        made = batch.from_noise(noise, **region)
    else:
        made = batch.from_image(x_start, noise, strength, **region)
    return x_start * keep + made * (1.0 - keep)


def beside_latents(batch: Batch, pixels: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, 1 + C, h, w]: what a model that was trained to inpaint sees beside its latents.

    With a prompt (`hybrid`, Stable Diffusion's) that is the mask, 1 where it draws, and the scaled latents of the
    image with grey in the hole; without one (`concat`, latent diffusion's) the latents of the image with black in
    the hole, as the condition's encoder gives them, and then the mask in [-1, 1].

    Raises:
        UserError: the model takes other channels.
    """
    model = batch.model
    small = F.interpolate(mask, size=size).repeat(len(batch), 1, 1, 1)
    kept = mask < 0.5
    if model.model.conditioning_key == "hybrid":
        both = torch.cat([small, batch.latents(torch.where(kept, pixels, 0.0))], dim=1)
    elif model.model.conditioning_key == "concat":
        masked = torch.where(kept, pixels, -1.0).to(dtype_of(model.first_stage_model))
        encoded = model.get_learned_conditioning(masked).float()
        both = torch.cat([encoded.repeat(len(batch), 1, 1, 1), 2.0 * small - 1.0], dim=1)
    else:
        raise UserError("inpainting: this model's network takes more channels than its conditioning_key provides")
    if both.shape[1] != extra_channels(model):
        raise UserError(
            f"inpainting: this model takes {extra_channels(model)} channels beside its latents, and mask and masked "
            f"image are {both.shape[1]}; it was trained for something else"
        )
    return both


def with_empty_mask(batch: Batch, geometry: Geometry, size: tuple[int, int]) -> Batch:
    """For whole pictures: an inpainting model is shown grey under a mask that covers everything."""
    if not extra_channels(batch.model):
        return batch
    pixels = torch.zeros(1, 3, *(side * geometry.factor for side in size), device=batch.model.device)
    return batch.beside(beside_latents(batch, pixels, torch.ones_like(pixels[:, :1]), size))
