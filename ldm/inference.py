"""Pictures from models: load one, text to image, image to image, files.

    from ldm.inference import load_model, text_to_image
    model = load_model("models/tiny/config.yaml", "models/tiny/model.safetensors")
    pictures = text_to_image(model, ["a large red circle on a white background"], seed=1)
    pictures[0].image.show()

Every picture has its own seed and its own random numbers: it is the same alone and in any batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from ldm.loading import Geometry, load_model
from ldm.models.diffusion.sampling import draw_normal
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.pictures import to_uint8
from ldm.outputs import Picture, Settings
from ldm.safety import Protection
from ldm.util import UserError

__all__ = [
    "SAMPLERS",
    "Geometry",
    "Options",
    "Picture",
    "Protection",
    "Settings",
    "image_to_image",
    "img2img",
    "load_model",
    "load_model_from_config",
    "text_to_image",
    "txt2img",
]

load_model_from_config = load_model  # the name in the original's scripts


@dataclass(frozen=True)
class SamplerChoice:
    """Where a sampler is, and what people call it."""

    module: str
    name: str
    title: str


SAMPLERS = {
    "ddim": SamplerChoice("ldm.models.diffusion.ddim", "DDIMSampler", "DDIM"),
    "plms": SamplerChoice("ldm.models.diffusion.plms", "PLMSSampler", "PLMS"),
    "dpm_solver": SamplerChoice("ldm.models.diffusion.dpm_solver", "DPMSolverSampler", "DPM++ 2M"),
}


def _precision(precision: str, device: torch.device) -> AbstractContextManager:
    """`autocast` is half precision on CUDA; elsewhere, as in the original, it changes nothing."""
    half = precision == "autocast" and device.type == "cuda"
    return torch.autocast("cuda", dtype=torch.float16) if half else nullcontext()


def _make_sampler(model: nn.Module, sampler: str) -> Any:
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: '{sampler}' is none of {', '.join(SAMPLERS)}")
    choice = SAMPLERS[sampler]
    return getattr(importlib.import_module(choice.module), choice.name)(model)


def _guidance(model: nn.Module, prompts: Sequence[str], negative: str, scale: float) -> dict[str, Any]:
    """Conditions of a batch of prompts, as the samplers take them; no second pass when `scale` is 1."""
    unconditional = model.get_learned_conditioning([negative] * len(prompts)) if scale != 1.0 else None
    return {"unconditional_guidance_scale": scale, "unconditional_conditioning": unconditional}


def _finish(model: nn.Module, latents: torch.Tensor) -> list[Image.Image]:
    images = model.decode_first_stage(latents)
    if not torch.isfinite(images).all():
        raise UserError("sampling gave values that are not numbers; are the weights damaged? try --precision full")
    return [Image.fromarray(array) for array in to_uint8(images)]


@dataclass(frozen=True)
class Options:
    """How to draw: what text to image and image to image have in common.

    Args:
        sampler: `ddim`, `plms` or `dpm_solver` (DPM-Solver++ 2M).
        scale: classifier-free guidance, eps(empty) + scale * (eps(prompt) - eps(empty)); 1 for none.
        eta: noise of DDIM's steps, from 0 (none) to 1.
        precision: `autocast` (half precision on CUDA) or `full`.
        batch_size: pictures at a time; the pictures do not depend on it.
        protection: safety checker and watermark; by default what the model calls for.
    """

    steps: int = 50
    sampler: str = "ddim"
    scale: float = 7.5
    eta: float = 0.0
    negative_prompt: str = ""
    precision: str = "autocast"
    batch_size: int = 4
    protection: Protection | None = None
    progress: bool = True


Draw = Callable[[Any, list[str], list[torch.Generator], dict[str, Any]], torch.Tensor]


def _draw(
    model: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: Options,
    size: tuple[int, int],
    draw: Draw,
    strength: float | None = None,
) -> list[Picture]:
    """Pictures from `draw(sampler, prompts, generators, guidance) -> latents`, batch by batch."""
    if options.eta and options.sampler != "ddim":
        raise UserError(f"eta {options.eta:g}: only the sampler ddim draws noise in its steps")
    protection = options.protection or Protection.of(model)
    sampler = _make_sampler(model, options.sampler)
    pictures: list[Picture] = []
    for first in range(0, len(prompts), options.batch_size):
        part = slice(first, first + options.batch_size)
        batch, batch_seeds = list(prompts[part]), seeds[part]
        generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
        with torch.inference_mode(), _precision(options.precision, model.device), model.ema_scope():
            guidance = _guidance(model, batch, options.negative_prompt, options.scale)
            images = _finish(model, draw(sampler, batch, generators, guidance))
        images, blocked = protection.apply(images)
        for prompt, seed, image, bad in zip(batch, batch_seeds, images, blocked, strict=True):
            settings = Settings(
                prompt=prompt,
                negative_prompt=options.negative_prompt,
                seed=seed,
                steps=options.steps,
                sampler=SAMPLERS[options.sampler].title,
                scale=options.scale,
                eta=options.eta,
                height=size[0],
                width=size[1],
                strength=strength,
                **getattr(model, "origin", {}),
            )
            pictures.append(Picture(image, settings, bad))
    return pictures


def text_to_image(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    seed: int = 42,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> list[Picture]:
    """One picture a prompt.

    Args:
        seed: picture i has the seed `seed + i`, unless `seeds` gives one a prompt.
        height, width: pixels, by default those of the model's training.
        options: those of `Options`, e.g. `steps=20, sampler="dpm_solver", scale=5.0`.

    Raises:
        UserError: sizes or names are wrong, or the safety checker's weights are missing.
    """
    options = Options(**options)
    geometry = Geometry.of(model)
    size = height or geometry.height, width or geometry.width
    geometry.check(*size)
    shape = (geometry.channels, size[0] // geometry.factor, size[1] // geometry.factor)

    def draw(sampler: Any, batch: list[str], generators: list[torch.Generator], guidance: dict) -> torch.Tensor:
        noise = draw_normal((len(batch), *shape), generators, model.device)
        return _from_noise(sampler, model, noise, batch, generators, options, guidance)

    return _draw(model, prompts, _seeds(seed, seeds, prompts), options, size, draw)


def image_to_image(
    model: nn.Module,
    image: Image.Image,
    prompts: Sequence[str],
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
        Other arguments are those of `text_to_image`.

    Raises:
        UserError: strength or sizes are wrong, or the safety checker's weights are missing.
    """
    options = Options(**{"scale": 5.0, **options})
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength {strength:g}: must be above 0 and at most 1")
    start = prepare_image(image, Geometry.of(model), height, width)
    size = tuple(start.shape[2:])
    t_enc = max(1, int(strength * options.steps))

    def draw(sampler: Any, batch: list[str], generators: list[torch.Generator], guidance: dict) -> torch.Tensor:
        random = _PictureRandom(generators)
        encoding = _repeated(model.encode_first_stage(start.to(model.device)), len(batch))
        noise = random.randn_like(encoding if isinstance(encoding, torch.Tensor) else encoding.mean)
        if strength == 1.0:  # nothing of the image is left
            return _from_noise(sampler, model, noise, batch, generators, options, guidance)
        x_start = model.get_first_stage_encoding(encoding, random)
        sampler.make_schedule(options.steps, **({"ddim_eta": options.eta} if options.eta else {}))
        t = torch.full((len(batch),), t_enc, device=model.device)
        return sampler.decode(
            sampler.stochastic_encode(x_start, t, noise=noise),
            model.get_learned_conditioning(batch),
            t_enc,
            generator=generators,
            show_progress=options.progress,
            **guidance,
        )

    return _draw(model, prompts, _seeds(seed, seeds, prompts), options, size, draw, strength)


def _from_noise(
    sampler: Any,
    model: nn.Module,
    noise: torch.Tensor,
    batch: list[str],
    generators: list[torch.Generator],
    options: Options,
    guidance: dict[str, Any],
) -> torch.Tensor:
    """Latents [B, C, h, w] from `noise` of that shape by all steps of the sampler."""
    latents, _ = sampler.sample(
        options.steps,
        len(batch),
        noise.shape[1:],
        model.get_learned_conditioning(batch),
        eta=options.eta,
        x_T=noise,
        generator=generators,
        verbose=False,
        show_progress=options.progress,
        **guidance,
    )
    return latents


def _seeds(seed: int, seeds: Sequence[int] | None, prompts: Sequence[str]) -> list[int]:
    return [seed + i for i in range(len(prompts))] if seeds is None else list(seeds)


class _PictureRandom:
    """Random numbers of a batch of pictures, each from its own generator."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return draw_normal(x.shape, self.generators, x.device)


def _repeated(encoding: Any, count: int) -> Any:
    """The first stage's encoding of one image, for a batch of `count`."""
    if isinstance(encoding, torch.Tensor):
        return encoding.repeat(count, 1, 1, 1)
    return DiagonalGaussianDistribution(encoding.parameters.repeat(count, 1, 1, 1))


def prepare_image(
    image: Image.Image, geometry: Geometry, height: int | None = None, width: int | None = None
) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]: turned as EXIF says, on white, sized to what the model takes."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    width, height = (
        given or max(1, own // geometry.multiple) * geometry.multiple
        for given, own in ((width, image.width), (height, image.height))
    )
    geometry.check(height, width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()


def txt2img(model: nn.Module, prompts: Sequence[str], **options: Any) -> list[Image.Image]:
    """The images of `text_to_image` without their settings."""
    return [picture.image for picture in text_to_image(model, prompts, **options)]


def img2img(model: nn.Module, image: Image.Image, prompts: Sequence[str], **options: Any) -> list[Image.Image]:
    """The images of `image_to_image` without their settings."""
    return [picture.image for picture in image_to_image(model, image, prompts, **options)]
