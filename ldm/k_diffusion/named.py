"""k-diffusion's samplers and schedules by their names: what each needs beside a model, x and its levels of noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ldm.k_diffusion import sampling
from ldm.k_diffusion.noise import BrownianTreeNoiseSampler, Seeds, default_noise_sampler
from ldm.k_diffusion.schedules import (
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    vp_between,
)
from ldm.k_diffusion.steps import Callback, Model

# Of (n, sigma_min, sigma_max); karras and polyexponential also have a rho.
SCHEDULES: dict[str, Callable[..., torch.Tensor]] = {
    "karras": get_sigmas_karras,
    "exponential": get_sigmas_exponential,
    "polyexponential": get_sigmas_polyexponential,
    "vp": lambda n, sigma_min, sigma_max: get_sigmas_vp(n, *vp_between(sigma_min, sigma_max)),
}
BETWEEN_TWO = ("dpm_fast", "dpm_adaptive")  # they are given the highest and lowest level, and find their own steps
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")


def function_of(kind: str) -> Callable[..., Any]:
    """`ldm.k_diffusion.sampling`'s sample_<kind>."""
    return getattr(sampling, f"sample_{kind}")


def takes(kind: str, setting: str) -> bool:
    """Whether a sampler has a setting."""
    return setting in inspect.signature(function_of(kind)).parameters


def levels_of(kind: str, steps: int, schedule: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """[steps + 1] levels by `schedule(n)`; the last one is 0, or the lowest for what finds its own steps."""
    return schedule(steps + 1)[:-1] if kind in BETWEEN_TWO else schedule(steps)


def sample(
    kind: str,
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    seeds: Seeds,
    ends: tuple[float, float],
    callback: Callback | None = None,
    settings: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """What x [B, ...] leads to over `sigmas`, which are of `levels_of`.

    Args:
        seeds: of the noise of the steps, see `ldm.k_diffusion.noise`.
        ends: the lowest and the highest level that any run of the model has; a Brownian path reaches over them.
        settings: more of what the sampler takes, e.g. eta.
    """
    more: dict[str, Any] = {"callback": callback, "disable": True, **(settings or {})}
    if takes(kind, "noise_sampler"):
        brownian = kind in BROWNIAN
        more["noise_sampler"] = (
            BrownianTreeNoiseSampler(x, *ends, seeds) if brownian else default_noise_sampler(x, seeds)
        )
    if kind not in BETWEEN_TWO:
        return function_of(kind)(model, x, sigmas, **more)
    count = {"n": len(sigmas) - 1} if kind == "dpm_fast" else {}
    return function_of(kind)(model, x, float(sigmas[-1]), float(sigmas[0]), **count, **more)
