"""Pictures from a denoiser of pixels, by any of k-diffusion's samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ldm.errors import UserError
from ldm.k_diffusion.named import SCHEDULES, levels_of, sample
from ldm.k_diffusion.steps import Model
from ldm.models.diffusion.sampling import draw_normal
from ldm.modules.pictures import to_uint8
from ldm.samplers import SAMPLERS, check_choice, title_of
from ldm.util import instantiate_from_config

CHOICES = {name: choice for name, choice in SAMPLERS.items() if "sampler" in choice.settings}


@dataclass(frozen=True)
class PixelSampler:
    """How pictures are drawn.

    Args:
        steps: of the sampler. sampler: one of k-diffusion's. schedule: of the noise levels, a name in `SCHEDULES`.
        eta: noise of the steps, from 0 to 1; None for the sampler's own. settings: more of what the sampler takes.

    Raises:
        UserError: there is no such sampler or schedule, or they do not go together.
    """

    steps: int = 50
    sampler: str = "dpmpp_2m"
    schedule: str | None = None
    eta: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in CHOICES:
            raise UserError(f"sampler: '{self.sampler}' is none of {', '.join(CHOICES)}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise UserError(f"schedule: '{self.schedule}' is none of {', '.join(SCHEDULES)}")
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} must be at least 1")
        check_choice(self.sampler, self.schedule, self.eta, self.settings)

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> PixelSampler:
        """From a yaml's section, or without one.

        Raises:
            UserError: it has a setting that is none.
        """
        target = f"{cls.__module__}.{cls.__qualname__}"
        return instantiate_from_config({"target": target, "params": dict(settings or {})})

    @property
    def title(self) -> str:
        """What people call the sampler and schedule."""
        scheduled = CHOICES[self.sampler].scheduled
        return title_of(self.sampler, (self.schedule or "karras") if scheduled else None)

    def draw(
        self,
        model: Model,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
        device: torch.device,
        sigma_min: float,
        sigma_max: float,
        callback: Callable[..., None] | None = None,
    ) -> torch.Tensor:
        """Images [B, *shape] by a denoiser, one for each generator, which gives all of the image's random numbers.

        Args:
            callback: called after every step.
        """
        settings = {**CHOICES[self.sampler].settings, **self.settings}
        kind, rho = settings.pop("sampler"), {name: settings.pop(name) for name in ("rho",) if name in settings}
        if self.eta is not None and CHOICES[self.sampler].eta is not None:
            settings["eta"] = self.eta
        schedule = SCHEDULES[self.schedule or "karras"]
        sigmas = levels_of(kind, self.steps, lambda n: schedule(n, sigma_min, sigma_max, **rho)).to(device)
        x = sigmas[0] * draw_normal((len(generators), *shape), list(generators), device)
        return sample(kind, model, x, sigmas, list(generators), (sigma_min, sigma_max), callback, settings)


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of [B, C, H, W] in [-1, 1], where C is 1 or 3."""
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in to_uint8(images)]
