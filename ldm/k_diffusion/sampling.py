"""The samplers, under k-diffusion's names; what they have in common:

Args:
    model: `model(x, sigma[B], **extra_args)` -> the denoised x.
    x: [B, ...], noise times sigmas[0] (plus an image, to start from one).
    sigmas: levels of noise, as the schedules give them.
    callback: called in every step with a dict of x, i, sigma, sigma_hat and denoised.
    disable: no progress bar (None: only where no person looks on).
    s_churn, s_tmin, s_tmax, s_noise: how much noise each step adds before it takes it away, between which levels,
        and its standard deviation (Karras et al., 2022, algorithm 2).
    eta: noise of ancestral steps and SDEs, from 0 (none) to 1 (as much as the trained process has).
    noise_sampler: see `ldm.k_diffusion.noise`, with which a picture's noise does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm.k_diffusion.dpm_solver import PIDStepSizeController, sample_dpm_adaptive, sample_dpm_fast
from ldm.k_diffusion.dpm_solver_class import DPMSolver
from ldm.k_diffusion.dpmpp import (
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
)
from ldm.k_diffusion.likelihood import log_likelihood
from ldm.k_diffusion.noise import BatchedBrownianTree, BrownianTreeNoiseSampler, NoiseSampler, default_noise_sampler
from ldm.k_diffusion.schedules import (
    append_zero,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
)
from ldm.k_diffusion.steps import Callback, Model, Steps, get_ancestral_step, to_d

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "DPMSolver",
    "PIDStepSizeController",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "linear_multistep_coeff",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]


@dataclass
class Churn:
    """Lines 5 and 6 of algorithm 2 (Karras et al., 2022): raise the level of noise before it is lowered."""

    steps: Steps
    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float
    noise_sampler: NoiseSampler | None

    def __call__(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
        """x_hat and sigma_hat."""
        gamma = min(self.s_churn / len(self.steps), math.sqrt(2) - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0
        if gamma == 0.0:
            return x, sigma
        sigma_hat = sigma * (1 + gamma)
        draw = self.noise_sampler or default_noise_sampler(x)
        return x + (sigma_hat**2 - sigma**2) ** 0.5 * self.s_noise * draw(sigma, sigma_hat), sigma_hat


@torch.no_grad()
def sample_euler(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """Algorithm 2 of Karras et al. (2022) without its second-order correction: Euler's method."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    churn = Churn(steps, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = churn(x, sigma)
        denoised = steps.denoise(x, sigma_hat)
        steps.tell(i, x, denoised, sigma_hat)
        x = x + (sigma_next - sigma_hat) * to_d(x, sigma_hat, denoised)
    return x


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """Ancestral sampling (Ho et al., 2020) in as few steps as one likes: Euler's method, then fresh noise."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    draw = noise_sampler or default_noise_sampler(x)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.tell(i, x, denoised)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        x = x + (sigma_down - sigma) * to_d(x, sigma, denoised)
        if sigma_up:
            x = x + sigma_up * s_noise * draw(sigma, sigma_next)
    return x


@torch.no_grad()
def sample_heun(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """Algorithm 2 of Karras et al. (2022): Heun's method, two calls of the model a step but for the last."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    churn = Churn(steps, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = churn(x, sigma)
        denoised = steps.denoise(x, sigma_hat)
        steps.tell(i, x, denoised, sigma_hat)
        d = to_d(x, sigma_hat, denoised)
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next:
            d_next = to_d(x_next, sigma_next, steps.denoise(x_next, sigma_next))
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = x_next
    return x


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """The midpoint method, with DPM-Solver-2's middle (Lu et al., 2022a) and the churn of Karras et al. (2022)."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    churn = Churn(steps, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    for i, sigma, sigma_next in steps:
        x, sigma_hat = churn(x, sigma)
        denoised = steps.denoise(x, sigma_hat)
        steps.tell(i, x, denoised, sigma_hat)
        x = _midpoint_step(steps, x, denoised, sigma_hat, sigma_next)
    return x


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """Ancestral sampling by the steps of `sample_dpm_2`."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    draw = noise_sampler or default_noise_sampler(x)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.tell(i, x, denoised)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        x = _midpoint_step(steps, x, denoised, sigma, sigma_down)
        if sigma_up:
            x = x + sigma_up * s_noise * draw(sigma, sigma_next)
    return x


def _midpoint_step(
    steps: Steps, x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float
) -> torch.Tensor:
    """x at sigma_next by the slope in the middle of log sigma; to 0, which has no middle, by Euler's method."""
    d = to_d(x, sigma, denoised)
    if sigma_next:
        sigma_mid = math.sqrt(sigma * sigma_next)
        x_mid = x + (sigma_mid - sigma) * d
        d = to_d(x_mid, sigma_mid, steps.denoise(x_mid, sigma_mid))
    return x + (sigma_next - sigma) * d


def linear_multistep_coeff(order: int, t: Sequence[float], i: int, j: int) -> float:
    """Weight of the slope at t[i - j] in the step from t[i] to t[i + 1] of the linear multistep method of an order.

    It is the integral over the step of the Lagrange polynomial that is 1 there and 0 at the other order - 1 places. The
    polynomial's degree is order - 1, so that Gauss and Legendre's rule gives the integral exactly.

    Raises:
        ValueError: before step i there are not so many slopes.
    """
    if order - 1 > i:
        raise ValueError(f"order {order} is too high for step {i}")
    nodes, weights = np.polynomial.legendre.leggauss(order // 2 + 1)
    half = (t[i + 1] - t[i]) / 2
    tau = t[i] + half * (1 + nodes)
    factors = [(tau - t[i - k]) / (t[i - j] - t[i - k]) for k in range(order) if k != j]
    return float(half * (weights * np.prod(factors, axis=0)).sum())


@torch.no_grad()
def sample_lms(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> torch.Tensor:
    """The linear multistep method (Adams and Bashforth's for uneven steps) on the probability flow ODE."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    orders = [min(i + 1, order) for i in range(len(steps))]
    weights = [[linear_multistep_coeff(o, steps.levels, i, j) for j in range(o)] for i, o in enumerate(orders)]
    slopes: list[torch.Tensor] = []  # the newest first
    for i, sigma, _ in steps:
        denoised = steps.denoise(x, sigma)
        steps.tell(i, x, denoised)
        slopes = [to_d(x, sigma, denoised), *slopes][:order]
        x = x + sum(weight * d for weight, d in zip(weights[i], slopes, strict=True))
    return x
