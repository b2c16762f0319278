"""The engine of ldm.inference: pictures batch by batch, each from its own seed, through checker and watermark."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm.memory import give_back, keep_freed
from ldm.models.diffusion.sampling import draw_normal
from ldm.modules import tiling
from ldm.modules.encoders.modules import ClassEmbedder, FrozenClipImageEmbedder, SpatialRescaler
from ldm.modules.encoders.weighting import encode_weighted, stopped_early
from ldm.modules.fast_layers import sped_up
from ldm.modules.pictures import to_uint8
from ldm.outputs import Picture, Settings
from ldm.precision import dtype_of, set_precision
from ldm.safety import Protection
from ldm.samplers import A1111_WORDS, SAMPLERS, check_choice, title_of
from ldm.util import UserError

IN_TITLE = ("algorithm", "order", "method")  # of dpm_solver's settings, those that its name says
NO_TEXT = (ClassEmbedder, SpatialRescaler, FrozenClipImageEmbedder)  # encoders of other conditions


@dataclass(frozen=True)
class Preview:
    """A batch of pictures on the way, as `Options.callback` gets it after every step of the sampler.

    Args:
        step, steps: how far it is, from 1.
        pictures: the batch's places among all pictures that were asked for.
        latents: [B, C, h, w], the clean latents as the model sees them now.
    """

    step: int
    steps: int
    pictures: range
    latents: torch.Tensor
    decode: Callable[[torch.Tensor], list[Image.Image]] = field(repr=False)

    def images(self) -> list[Image.Image]:
        """The pictures as they look now, through the decoder (slow), without checker and watermark."""
        return self.decode(self.latents)


@dataclass(frozen=True)
class Options:
    """How to draw: what text to image, image to image and inpainting have in common.

    Args:
        steps: of the sampler; some call the network twice in each (`SamplerChoice.evaluations`).
        sampler: a name in `ldm.samplers.SAMPLERS`: ddim, plms, dpm_solver, euler, dpmpp_2m, ...
        schedule: the levels of noise of k-diffusion's samplers, a name in `ldm.samplers.SCHEDULES`; by default
            `uniform`, the model's own.
        solver: settings of the sampler, of those that it `takes`, e.g. s_churn; and rho, of the schedule.
        scale: classifier-free guidance, eps(empty) + scale * (eps(prompt) - eps(empty)); 1 for none.
        eta: noise of the steps, from 0 (none) to 1; by default none of DDIM's, and 1 for ancestral samplers and SDEs.
        precision: `full`, `autocast` (half precision on CUDA), `bf16` or `fp16`; see `ldm.precision`.
        batch_size: pictures at a time, when not exact.
        exact: draw the pictures of a batch one at a time, so that each is the same to the bit in any batch. At once
            they are drawn faster on a GPU, but the last digits of sums then depend on how many they are.
        prompt_weighting: `(word:1.2)` in prompts is a weight, not text.
        clip_skip: take the text encoder's last layer but clip_skip - 1; None for what the model was trained with.
        vae_tiling: decode in tiles, for large pictures in little memory; the colours may differ slightly.
        attention_slicing: attention in parts, for little memory, for which convolutions keep no second form of their
            weights either; the pictures stay the same but for rounding.
        protection: safety checker and watermark; by default what the model calls for.
        progress: show a bar of steps for every batch. among: (how many pictures came before, how many there are
            in all), for the bar's numbers when the pictures are some of many.
        callback: called with a `Preview` after every step; what it raises ends the run.
    """

    steps: int = 50
    sampler: str = "ddim"
    schedule: str | None = None
    solver: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 7.5
    eta: float | None = None
    negative_prompt: str = ""
    precision: str = "autocast"
    batch_size: int = 4
    exact: bool = True
    prompt_weighting: bool = False
    clip_skip: int | None = None
    vae_tiling: bool = False
    attention_slicing: bool = False
    protection: Protection | None = None
    progress: bool = True
    among: tuple[int, int] | None = None
    callback: Callable[[Preview], None] | None = None

    def __post_init__(self) -> None:
        check_choice(self.sampler, self.schedule, self.eta, self.solver)

    @property
    def ddim_eta(self) -> float:
        """The eta that DDIM's `make_schedule` takes; the others have theirs as a setting, or none."""
        return (self.eta or 0.0) if self.sampler == "ddim" else 0.0

    @property
    def own_eta(self) -> float | None:
        """The eta of the steps where it is not what the sampler has by default."""
        usual = SAMPLERS[self.sampler].eta
        return None if usual is None or self.eta == usual else self.eta

    def make_sampler(self, model: nn.Module) -> Any:
        """The sampler, for a model."""
        choice = SAMPLERS[self.sampler]
        settings = {**choice.settings, **self.solver}
        if self.schedule is not None:
            settings["schedule"] = self.schedule
        if self.own_eta is not None and self.sampler != "ddim":
            settings["eta"] = self.own_eta
        return getattr(importlib.import_module(choice.module), choice.name)(model, **settings)

    def batches(self, count: int) -> Iterator[range]:
        """The places of `count` pictures, those together that are drawn at once."""
        size = 1 if self.exact or SAMPLERS[self.sampler].alone else self.batch_size
        return (range(first, min(first + size, count)) for first in range(0, count, size))


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once, with all that the sampler has to know of them."""

    model: nn.Module
    sampler: Any
    options: Options
    generators: list[torch.Generator]
    conditioning: Any
    unconditional: Any
    img_callback: Callable[[torch.Tensor, int], None] | None = None

    def __len__(self) -> int:
        return len(self.generators)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Normal numbers [B, ...], each picture's from its own generator."""
        return draw_normal(x.shape, self.generators, x.device).to(x.dtype)

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """The start [B, *shape] of sampling."""
        return draw_normal((len(self), *shape), self.generators, self.model.device)

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] of one image [1, 3, H, W]: a draw from its posterior for each picture."""
        image = image.to(self.model.device, dtype_of(self.model.first_stage_model))
        encoding = self.model.encode_first_stage(image)
        if isinstance(encoding, torch.Tensor):
            encoding = encoding.repeat(len(self), 1, 1, 1)
        else:
            encoding = type(encoding)(encoding.parameters.repeat(len(self), 1, 1, 1))
        return self.model.get_first_stage_encoding(encoding, self).float()

    def beside(self, c_concat: torch.Tensor) -> Batch:
        """The same batch with channels [B, K, h, w] beside its latents, as inpainting models want them."""
        if self.model.model.conditioning_key == "concat":
            return replace(self, conditioning=c_concat, unconditional=None)
        both = [self.conditioning, self.unconditional]
        c, uc = (None if text is None else {"c_concat": [c_concat], "c_crossattn": [text]} for text in both)
        return replace(self, conditioning=c, unconditional=uc)

    def guidance(self) -> dict[str, Any]:
        """What every call of a sampler needs."""
        return {
            "unconditional_guidance_scale": self.options.scale if self.unconditional is not None else 1.0,
            "unconditional_conditioning": self.unconditional,
            "generator": self.generators,
            "img_callback": self.img_callback,
            "show_progress": self.options.progress,
        }

    def from_noise(self, noise: torch.Tensor, **known: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] from `noise` by all steps; `known` may hold mask and x0."""
        options = self.options
        latents, _ = self.sampler.sample(
            options.steps,
            len(self),
            noise.shape[1:],
            self.conditioning,
            eta=options.ddim_eta,
            x_T=noise,
            verbose=False,
            **self.guidance(),
            **known,
        )
        return latents

    def from_image(
        self, x_start: torch.Tensor, noise: torch.Tensor, strength: float, **known: torch.Tensor
    ) -> torch.Tensor:
        """Latents from x_start, noised with `noise` and denoised over the last `strength` of the steps."""
        options, sampler = self.options, self.sampler
        sampler.make_schedule(options.steps, ddim_eta=options.ddim_eta)
        t_enc = max(1, int(strength * options.steps))
        t = torch.full((len(self),), t_enc, device=x_start.device)
        x = sampler.stochastic_encode(x_start, t, noise=noise)
        return sampler.decode(x, self.conditioning, t_enc, **self.guidance(), **known)


@dataclass(frozen=True)
class Job:
    """Pictures that were asked for.

    Args:
        size: (height, width) in pixels, for the settings.
        draw: a batch's latents. paste: what is done to its images, before the checker and after the watermark.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    size: tuple[int, int]
    draw: Callable[[Batch], torch.Tensor]
    strength: float | None = None
    paste: Callable[[Image.Image], Image.Image] = lambda image: image


def draw_pictures(model: nn.Module, job: Job, options: Options) -> list[Picture]:
    """All pictures of a job.

    Raises:
        UserError: an option is wrong, or what came out are no numbers.
    """
    if len(job.seeds) != len(job.prompts):
        raise UserError(f"seeds: {len(job.seeds)} for {len(job.prompts)} prompts; give one for each")
    protection = options.protection or Protection.of(model)
    sampler = options.make_sampler(model)
    title = title_of(options.sampler, options.schedule) or sampler.name
    pictures: list[Picture] = []
    with set_up(model, options):
        for places in options.batches(len(job.prompts)):
            sampler.name = f"{title}, {numbers(places, *(options.among or (0, len(job.prompts))))}"
            images = _draw_batch(model, job, options, sampler, places)
            images, blocked = protection.apply([job.paste(image) for image in images])
            for place, image, bad in zip(places, images, blocked, strict=True):
                settings = _settings(model, job, options, title, place)
                pictures.append(Picture(image if bad else job.paste(image), settings, bad))
    return pictures


@contextmanager
def set_up(model: nn.Module, options: Options) -> Iterator[None]:
    """Everything that is switched for a run: precision, averaged weights, attention, layout, text encoder, memory."""
    slices = tiling.SLICE if options.attention_slicing else None
    tiling.slice_attention(model, slices)
    within = set_precision(model, options.precision)
    with torch.inference_mode(), within, model.ema_scope(), stopped_early(model.cond_stage_model, options.clip_skip):
        with _sped_up(model, options), _memory_told(model.device):
            yield


@contextmanager
def _sped_up(model: nn.Module, options: Options) -> Iterator[None]:
    """Layers in less time, where memory does not come first."""
    if options.attention_slicing:
        yield
    else:
        keep_freed()
        try:
            with sped_up(model.model), sped_up(model.first_stage_model, keep=False):
                yield
        finally:
            give_back()


@contextmanager
def _memory_told(device: torch.device) -> Iterator[None]:
    """Turn what torch says when memory runs out into advice."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "DefaultCPUAllocator")):
            raise
        raise UserError(
            f"the memory of the device {device} is too small for this; draw fewer or smaller pictures at once, or "
            "give --attention_slicing, --vae_tiling, or --precision fp16"
        ) from error


def numbers(places: range, before: int, total: int) -> str:
    """Which of `total` pictures are at `places` after those `before`, for a bar's title."""
    first, last = before + places[0] + 1, before + places[-1] + 1
    which = f"picture {first}" if first == last else f"pictures {first}-{last}"
    return f"{which} of {total}"


def _draw_batch(model: nn.Module, job: Job, options: Options, sampler: Any, places: range) -> list[Image.Image]:
    prompts = [job.prompts[i] for i in places]

    def images_of(latents: torch.Tensor) -> list[Image.Image]:
        return decode(model, latents, options.vae_tiling)

    def show(pred_x0: torch.Tensor, i: int) -> None:
        options.callback(Preview(i + 1, sampler.total, places, pred_x0, images_of))

    batch = Batch(
        model,
        sampler,
        options,
        generators_of(model, [job.seeds[i] for i in places]),
        _encoded(model, prompts, options),
        _encoded(model, [options.negative_prompt] * len(prompts), options) if options.scale != 1.0 else None,
        show if options.callback else None,
    )
    return images_of(job.draw(batch))


def generators_of(model: nn.Module, seeds: Sequence[int]) -> list[torch.Generator]:
    """A picture's own random numbers, for each seed; on CUDA they are the original's."""
    device = model.device if model.device.type == "cuda" else "cpu"
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _encoded(model: nn.Module, prompts: list[str], options: Options) -> Any:
    """The condition of prompts; None for a model that takes none.

    Raises:
        UserError: the model is led by something else than text.
    """
    if model.model.conditioning_key in (None, "concat"):
        return None
    if model.model.conditioning_key == "adm" or isinstance(model.cond_stage_model, NO_TEXT):
        raise UserError(
            f"this model is led by '{model.cond_stage_key}', not by text; scripts/sample_diffusion.py draws with it"
        )
    if options.prompt_weighting:
        return encode_weighted(model.cond_stage_model, prompts)
    return model.get_learned_conditioning(prompts)


def decode(model: nn.Module, latents: torch.Tensor, in_tiles: bool = False) -> list[Image.Image]:
    """The pictures of latents [B, C, h, w].

    Raises:
        UserError: they are no numbers.
    """

    def decoded() -> torch.Tensor:
        z = latents.to(dtype_of(model.first_stage_model))
        return tiling.tiled(model.decode_first_stage, z) if in_tiles else model.decode_first_stage(z)

    images = decoded()
    if not torch.isfinite(images).all():  # some autoencoders' values are too large for half precision
        with torch.inference_mode(False), torch.autocast(model.device.type, enabled=False):
            model.first_stage_model.float()
            with torch.inference_mode():
                images = decoded()
    if not torch.isfinite(images).all():
        raise UserError("sampling gave values that are not numbers; are the weights damaged? try --precision full")
    return [Image.fromarray(array) for array in to_uint8(images)]


def _settings(model: nn.Module, job: Job, options: Options, title: str, place: int) -> Settings:
    said = {*A1111_WORDS, *(IN_TITLE if options.sampler == "dpm_solver" else ())}
    return Settings(
        prompt=job.prompts[place],
        negative_prompt=options.negative_prompt,
        seed=job.seeds[place],
        steps=options.steps,
        sampler=title,
        scale=options.scale,
        eta=options.own_eta,
        height=job.size[0],
        width=job.size[1],
        strength=job.strength,
        clip_skip=options.clip_skip,
        prompt_weighting=options.prompt_weighting,
        solver=", ".join(f"{key} {value}" for key, value in options.solver.items() if key not in said),
        noise_settings={word: f"{options.solver[key]:g}" for key, word in A1111_WORDS.items() if key in options.solver},
        precision=options.precision,
        **{key: os.fspath(value) for key, value in getattr(model, "origin", {}).items()},
    )
