"""Pictures from models that are led by no prompt: unconditional, by class, or by an image.

    from ldm.inference import load_model
    from ldm.unprompted import by_class, draw
    model = load_model("configs/latent-diffusion/cin256-v2.yaml", "models/ldm/cin256-v2/model.ckpt")
    for images in draw(model, range(8), by_class(model, [25, 187], null_class=1000), scale=3.0):
        images[0].show()

Every picture has its own seed, as in `ldm.inference`; they come batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from ldm.drawing import Batch, Options, decode, generators_of, numbers, set_up
from ldm.images import as_tensor, on_white
from ldm.k_diffusion.pixels import PixelSampler, as_pictures
from ldm.k_diffusion.training import KarrasDiffusion
from ldm.loading import Geometry
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.modules.encoders.modules import ClassEmbedder, FrozenClipImageEmbedder, SpatialRescaler
from ldm.precision import dtype_of
from ldm.samplers import SAMPLERS
from ldm.util import UserError


@dataclass(frozen=True)
class Condition:
    """What leads a model.

    Args:
        encode: the condition of the pictures at some places among all, and the one without it for guidance.
        height, width: pixels; None for those of the model's training.
    """

    encode: Callable[[range], tuple[Any, Any]]
    height: int | None = None
    width: int | None = None


UNLED = Condition(lambda places: (None, None))


def kind_of_condition(model: nn.Module) -> str:
    """What leads a model: `nothing`, `class` or `image`.

    Raises:
        UserError: something else.
    """
    if isinstance(model, KarrasDiffusion):
        return "nothing"
    encoder = getattr(model, "cond_stage_model", None)
    if not hasattr(model, "first_stage_model"):
        raise UserError("yaml: model.target: neither LatentDiffusion nor KarrasDiffusion: it cannot be drawn from here")
    if model.model.conditioning_key is None:
        return "nothing"
    if isinstance(encoder, ClassEmbedder):
        return "class"
    beside = model.model.conditioning_key == "concat" and isinstance(encoder, nn.Identity | SpatialRescaler)
    if beside or isinstance(encoder, FrozenClipImageEmbedder):
        return "image"
    raise UserError(
        f"this model is led by '{model.cond_stage_key}'; scripts/txt2img.py draws from captions and "
        "scripts/inpaint.py inside masks"
    )


def by_class(model: nn.Module, classes: Sequence[int], null_class: int | None = None) -> Condition:
    """Pictures of `classes`, by turns; none of them is all of the model's.

    Args:
        null_class: the class that stands for none, for guidance (1000 in cin256-v2).

    Raises:
        UserError: the model has no such class.
    """
    count = model.cond_stage_model.n_classes
    classes = list(classes) or [number for number in range(count) if number != null_class]
    for number in (*classes, *([] if null_class is None else [null_class])):
        if not 0 <= number < count:
            raise UserError(f"class {number}: this model has the classes 0 to {count - 1}")

    def encode(places: range) -> tuple[Any, Any]:
        labels = [classes[place % len(classes)] for place in places]
        empty = None if null_class is None else model.get_learned_conditioning([null_class] * len(places))
        return model.get_learned_conditioning(labels), empty

    return Condition(encode)


def by_image(model: nn.Module, image: Image.Image) -> Condition:
    """Pictures led by an image: one to vary, a small one to enlarge, or a map whose values are numbers of classes.

    A map is read as it is (a palette's numbers, or shades of grey); any other image as RGB. Only variations can be
    guided.

    Raises:
        UserError: the model does not take that size, or has no such class.
    """
    if isinstance(model.cond_stage_model, FrozenClipImageEmbedder):
        return _variation(model, image)
    geometry, encoder = Geometry.of(model), model.cond_stage_model
    mapper = getattr(encoder, "channel_mapper", None)
    classes = 0 if mapper is None or mapper.in_channels == 3 else mapper.in_channels
    pixels = _one_hot(image, classes) if classes else as_tensor(np.asarray(on_white(image)))
    shrinks = encoder.multiplier**encoder.n_stages if isinstance(encoder, SpatialRescaler) else 1.0
    height, width = (round(side * shrinks) * geometry.factor for side in pixels.shape[2:])
    if height % geometry.multiple or width % geometry.multiple:
        step = round(geometry.multiple / geometry.factor / shrinks)
        raise UserError(f"--image: {image.width}x{image.height}: this model needs sides that are multiples of {step}")

    def encode(places: range) -> tuple[Any, Any]:
        given = pixels.to(model.device, dtype_of(model.cond_stage_model))
        return model.get_learned_conditioning(given).float().repeat(len(places), 1, 1, 1), None

    return Condition(encode, height, width)


def _variation(model: nn.Module, image: Image.Image) -> Condition:
    """Pictures that resemble an image; without it is the embedding zero."""
    pixels = as_tensor(np.asarray(on_white(image)))

    def encode(places: range) -> tuple[Any, Any]:
        given = pixels.to(model.device, dtype_of(model.cond_stage_model))
        embedding = model.get_learned_conditioning(given).repeat(len(places), 1, 1)
        return embedding, torch.zeros_like(embedding)

    return Condition(encode)


def _one_hot(image: Image.Image, classes: int) -> torch.Tensor:
    """[1, classes, H, W] from an image whose values are numbers of classes."""
    numbers = np.asarray(image if image.mode in ("P", "L", "I", "I;16") else image.convert("L")).astype(np.int64)
    if numbers.max() >= classes:
        raise UserError(f"--image: it has the class {numbers.max()}; this model has the classes 0 to {classes - 1}")
    return F.one_hot(torch.from_numpy(numbers), classes).permute(2, 0, 1)[None].float()


def draw(
    model: nn.Module,
    seeds: Sequence[int],
    condition: Condition = UNLED,
    *,
    steps: int = 50,
    eta: float = 1.0,
    vanilla: bool = False,
    scale: float = 1.0,
    batch_size: int = 10,
    precision: str = "autocast",
    vae_tiling: bool = False,
    attention_slicing: bool = False,
    progress: bool = True,
) -> Iterator[list[Image.Image]]:
    """One picture a seed, `batch_size` at a time.

    Args:
        steps, eta: DDIM's, eta 1 for as much noise as the trained process has. vanilla: that process itself.
        scale: guidance, for a condition that has an unconditional side.
        precision, vae_tiling, attention_slicing: see `ldm.drawing.Options`.

    Raises:
        UserError: a setting is wrong, or what came out are no numbers.
    """
    steps, eta = (model.num_timesteps, 0.0) if vanilla else (steps, eta)
    options = Options(
        steps=steps,
        eta=eta,
        scale=scale,
        batch_size=batch_size,
        exact=False,
        precision=precision,
        vae_tiling=vae_tiling,
        attention_slicing=attention_slicing,
        progress=progress,
    )
    sampler = AncestralSampler(model) if vanilla else options.make_sampler(model)
    geometry = Geometry.of(model)
    sides = condition.height or geometry.height, condition.width or geometry.width
    shape = (geometry.channels, *(side // geometry.factor for side in sides))
    title = sampler.name
    for places in options.batches(len(seeds)):
        sampler.name = f"{title}, {numbers(places, 0, len(seeds))}"
        generators = generators_of(model, [seeds[place] for place in places])
        with set_up(model, options):
            batch = Batch(model, sampler, options, generators, *condition.encode(places))
            images = decode(model, batch.from_noise(batch.noise(shape)), vae_tiling)
        yield images


def draw_pixels(
    model: KarrasDiffusion,
    seeds: Sequence[int],
    how: PixelSampler,
    *,
    batch_size: int = 10,
    progress: bool = True,
) -> Iterator[list[Image.Image]]:
    """Pictures of a `KarrasDiffusion`, one a seed, `batch_size` at a time.

    Raises:
        UserError: what came out are no numbers.
    """
    size = 1 if SAMPLERS[how.sampler].alone else batch_size
    for first in range(0, len(seeds), size):
        generators = generators_of(model, seeds[first : first + size])
        places = range(first, first + len(generators))
        with tqdm(desc=f"{how.title}, {numbers(places, 0, len(seeds))}", unit="step", disable=not progress) as bar:
            images = model.sample(generators, how, lambda _: bar.update())
        if not images.isfinite().all():
            raise UserError("sampling gave values that are not numbers; are the weights damaged?")
        yield as_pictures(images)
