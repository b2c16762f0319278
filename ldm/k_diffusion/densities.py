"""How often training sees each noise level: sigma as a function of a number u that is uniform in [0, 1).

model:
  params:
    sigma_density:
      target: ldm.k_diffusion.densities.LogNormal
      params: {loc: -1.2, scale: 1.2}

Each is a distribution's quantile function, so that numbers u of which there is one in every n-th of [0, 1) spread the
noise levels of a batch evenly. All compute in float64, for u near 0 or 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch

from ldm.errors import UserError

EDGE = 1e-7  # u is kept that far from 0 and 1 where the quantile there is infinite


class Density(ABC):
    """What all have in common: their numbers are checked, and they are called with u."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise UserError(f"yaml: sigma_density: {field.name} is {value!r}; it must be a number")
            if field.name not in ("loc", "min_value") and value <= 0:
                raise UserError(f"yaml: sigma_density: {field.name} is {value}; it must be above 0")
        low, high = getattr(self, "min_value", 0.0), getattr(self, "max_value", math.inf)
        if not 0 <= low < high:
            raise UserError(f"yaml: sigma_density: from min_value {low} to max_value {high} there is nothing")

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """Noise levels in float32, of the shape of u."""
        return self.quantile(u.double()).float()

    @abstractmethod
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """Noise levels below which lies the share u of all."""


def normal_quantile(u: torch.Tensor) -> torch.Tensor:
    """The standard normal distribution's quantile function."""
    return torch.special.ndtri(u.clamp(EDGE, 1 - EDGE))


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)), for infinite x as well."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@dataclass(frozen=True)
class LogNormal(Density):
    """log(sigma) is normal with mean `loc` and standard deviation `scale` (Karras et al., 2022: -1.2 and 1.2)."""

    loc: float = -1.2
    scale: float = 1.2

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return (self.loc + self.scale * normal_quantile(u)).exp()


@dataclass(frozen=True)
class SplitLogNormal(Density):
    """log(sigma) is normal on either side of its mode `loc`, with widths `scale_1` below and `scale_2` above it."""

    loc: float
    scale_1: float
    scale_2: float

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        below = self.scale_1 / (self.scale_1 + self.scale_2)  # the share that lies there
        left = self.scale_1 * normal_quantile(u / (2 * below))
        right = self.scale_2 * normal_quantile(1 - (1 - u) / (2 * (1 - below)))
        return (self.loc + torch.where(u < below, left, right)).exp()


@dataclass(frozen=True)
class LogLogistic(Density):
    """log(sigma) is logistic with mean `loc` and scale `scale`, sigma cut to [`min_value`, `max_value`]."""

    loc: float = 0.0
    scale: float = 0.5
    min_value: float = 0.0
    max_value: float = math.inf

    def share_below(self, sigma: float) -> float:
        """The uncut distribution's share of noise levels below `sigma`."""
        return logistic((math.log(sigma) - self.loc) / self.scale) if sigma > 0 else 0.0

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        low, high = self.share_below(self.min_value), self.share_below(self.max_value)
        return (self.loc + self.scale * (low + u * (high - low)).clamp(EDGE, 1 - EDGE).logit()).exp()


@dataclass(frozen=True)
class LogUniform(Density):
    """log(sigma) is uniform, sigma from `min_value` to `max_value`."""

    min_value: float
    max_value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_value <= 0 or self.max_value == math.inf:
            raise UserError("yaml: sigma_density: LogUniform needs min_value above 0 and a finite max_value")

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        low, high = math.log(self.min_value), math.log(self.max_value)
        return (low + u * (high - low)).exp()


@dataclass(frozen=True)
class VDiffusion(Density):
    """arctan(sigma / `sigma_data`) is uniform, sigma from `min_value` to `max_value`: v-diffusion's cosine."""

    sigma_data: float = 1.0
    min_value: float = 1e-3
    max_value: float = 1e3

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        low, high = (math.atan(value / self.sigma_data) for value in (self.min_value, self.max_value))
        return (low + u * (high - low)).clamp(math.atan(EDGE), math.atan(1 / EDGE)).tan() * self.sigma_data


@dataclass(frozen=True)
class CosineInterpolated(Density):
    """The cosine schedule, shifted for the images' size (Hoogeboom et al., 2023: "simple diffusion").

    A shifted schedule has at resolution `image_d` the signal-to-noise ratio that the cosine schedule has at a lower
    one. log(SNR) goes from the schedule of `noise_d_high`, at the least noise, to that of `noise_d_low`, at the most.

    Args:
        image_d: pixels of the images' side. noise_d_high, noise_d_low: resolutions of the two schedules.
        sigma_data: standard deviation of the images. min_value, max_value: sigma's bounds.
    """

    image_d: float
    noise_d_high: float
    noise_d_low: float = 32.0
    sigma_data: float = 1.0
    min_value: float = 1e-3
    max_value: float = 1e3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_value <= 0 or self.max_value == math.inf:
            raise UserError("yaml: sigma_density: CosineInterpolated needs min_value above 0 and a finite max_value")

    def shifted(self, u: torch.Tensor, noise_d: float) -> torch.Tensor:
        """log(sigma / sigma_data) by the schedule that is shifted by log(image_d / noise_d)."""
        shift = math.log(self.image_d / noise_d)
        low, high = (
            math.atan(math.exp(math.log(value / self.sigma_data) - shift)) for value in (self.min_value, self.max_value)
        )
        return (low + u * (high - low)).tan().log() + shift

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        clean, noisy = self.shifted(u, self.noise_d_high), self.shifted(u, self.noise_d_low)
        return torch.lerp(clean, noisy, u).exp() * self.sigma_data


def strata(u: torch.Tensor, first: int = 0, stride: int = 1) -> torch.Tensor:
    """Numbers u [B] uniform in [0, 1), each moved into a part of [0, 1) of its own, one of stride * B equal ones.

    Args:
        first, stride: process `first` of `stride` processes, which take the parts in turn.
    """
    places = first + stride * torch.arange(len(u), device=u.device, dtype=torch.float64)
    return (places + u) / (stride * len(u))
