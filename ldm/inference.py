"""Pictures from models: load one, text to image, image to image, inpainting.

    from ldm.inference import load_model, txt2img
    model = load_model("models/tiny/config.yaml", "models/tiny/model.safetensors")
    picture = txt2img(model, ["a large red circle on a white background"], seed=1)[0]
    picture.image.show()  # a PIL image
    print(picture.settings.parameters())

Every picture has its own seed and its own random numbers: it is the same, to the bit, alone and in any batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from ldm.drawing import Batch, Job, Options, Preview, draw_pictures
from ldm.images import prepare_image
from ldm.inpainting import KnownRegion, draw_inside, with_empty_mask
from ldm.loading import Geometry, load_model
from ldm.outputs import Picture, Settings
from ldm.safety import Protection
from ldm.samplers import SAMPLERS, SCHEDULES
from ldm.util import UserError
from ldm.vae import load_vae

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Geometry",
    "Options",
    "Picture",
    "Preview",
    "Protection",
    "Settings",
    "img2img",
    "inpaint",
    "load_model",
    "load_model_from_config",
    "load_vae",
    "txt2img",
]


def load_model_from_config(config: DictConfig, ckpt: str | os.PathLike[str], verbose: bool = False) -> nn.Module:
    """`load_model` as the original's scripts call it; what does not fit is told with or without `verbose`."""
    return load_model(config, ckpt)


def txt2img(
    model: nn.Module,
    prompts: str | Sequence[str],
    *,
    seed: int = 42,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> list[Picture]:
    """One picture a prompt.

    Args:
        prompts: one, or several.
        seed: picture i has the seed `seed + i`, unless `seeds` gives one a prompt.
        height, width: pixels, by default those of the model's training.
        options: those of `Options`, e.g. `steps=20, sampler="dpmpp_2m", schedule="karras", scale=5.0`.

    Raises:
        UserError: sizes or names are wrong, or the safety checker's weights are missing.
    """
    geometry = Geometry.of(model)
    size = height or geometry.height, width or geometry.width
    geometry.check(*size)
    shape = (geometry.channels, size[0] // geometry.factor, size[1] // geometry.factor)

    def draw(batch: Batch) -> torch.Tensor:
        noise = batch.noise(shape)
        return with_empty_mask(batch, geometry, shape[1:]).from_noise(noise)

    return draw_pictures(model, _job(prompts, seed, seeds, size=size, draw=draw), Options(**options))


def img2img(
    model: nn.Module,
    image: Image.Image,
    prompts: str | Sequence[str],
    *,
    strength: float = 0.75,
    seed: int = 42,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> list[Picture]:
    """Variations of `image`, one a prompt: noised to `strength`, then denoised (SDEdit, Meng et al., 2021).

    Args:
        strength: in (0, 1], the share of the steps that is undone; 1 keeps nothing of the image.
        height, width: pixels to resize the image to; by default its own, rounded to what the model takes.
        Other arguments are those of `txt2img`.

    Raises:
        UserError: strength or sizes are wrong, or the safety checker's weights are missing.
    """
    _check_strength(strength)
    geometry = Geometry.of(model)
    start = prepare_image(image, geometry, height, width)
    size = tuple(side // geometry.factor for side in start.shape[2:])

    def draw(batch: Batch) -> torch.Tensor:
        noise = batch.noise((geometry.channels, *size))
        batch = with_empty_mask(batch, geometry, size)
        if strength == 1.0:  # nothing of the image is left
            return batch.from_noise(noise)
        return batch.from_image(batch.latents(start), noise, strength)

    job = _job(prompts, seed, seeds, size=tuple(start.shape[2:]), draw=draw, strength=strength)
    return draw_pictures(model, job, Options(**{"scale": 5.0, **options}))


def inpaint(
    model: nn.Module,
    image: Image.Image,
    mask: Image.Image,
    prompts: str | Sequence[str],
    *,
    strength: float = 1.0,
    seed: int = 42,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> list[Picture]:
    """`image` redrawn where `mask` is white, once a prompt; every other pixel comes out as it went in.

    A model that was trained to inpaint (it takes mask and masked image beside the latents) is given both; with any
    other the known latents are put back, noised, before every step. Watermark and checker go over the whole picture;
    then the pixels outside the mask are put back, so that the watermark stays inside it only.

    Args:
        mask: of the image's size; what is at least half white is redrawn.
        strength: in (0, 1], 1 for drawing from noise alone, less to keep something of what is under the mask.
        height, width: pixels to resize image and mask to; by default the image keeps its size, whatever it is.
        Other arguments are those of `txt2img`.

    Raises:
        UserError: mask, strength or sizes are wrong, or the safety checker's weights are missing.
    """
    _check_strength(strength)
    geometry = Geometry.of(model)
    if height is not None or width is not None:
        geometry.check(height or geometry.multiple, width or geometry.multiple)
    known = KnownRegion.of(image, mask, height, width)

    def draw(batch: Batch) -> torch.Tensor:
        return draw_inside(batch, known, geometry, strength)

    job = _job(prompts, seed, seeds, size=known.size, draw=draw, strength=strength, paste=known.paste)
    return draw_pictures(model, job, Options(**options))


def _check_strength(strength: float) -> None:
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength {strength:g}: must be above 0 and at most 1")


def _job(prompts: str | Sequence[str], seed: int, seeds: Sequence[int] | None, **what: Any) -> Job:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seed + i for i in range(len(prompts))] if seeds is None else list(seeds)
    return Job(prompts, seeds, **what)
