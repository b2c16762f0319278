"""DPM-Solver++ (Lu et al., 2022b) in sigma: single steps, multistep, and their SDEs.

With lambda = -log sigma as time and D as the denoised x, the ODE's (eta = 0) and the SDEs' mean over a step of h is

    x_next = e^-u x + phi_1(u) D + phi_2(u) h dD/dlambda + phi_3(u) h^2 d^2D/dlambda^2 + ...,   u = (1 + eta) h,
    phi_1(u) = 1 - e^-u,   phi_{k+1}(u) = 1 / k! - phi_k(u) / u,

and noise of variance sigma_next^2 (1 - e^(-2 eta h)) comes on top. Of first order, at eta = 0, it is
Euler's method in sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ldm.k_diffusion.noise import BrownianTreeNoiseSampler, NoiseSampler, default_noise_sampler
from ldm.k_diffusion.steps import Callback, Model, Steps, get_ancestral_step

SOLVER_TYPES = ("midpoint", "heun")


def phi(u: float) -> tuple[float, float, float]:
    """phi_1, phi_2 and phi_3 of the module's formula, for u != 0."""
    first = -math.expm1(-u)
    second = 1 - first / u
    return first, second, 0.5 - second / u


def first_order(x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """x at sigma_next, as if D were the same on all the way; at 0 it is D."""
    return torch.lerp(denoised, x, sigma_next / sigma)


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
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
    """Ancestral sampling by second-order single steps: DPM-Solver++(2S) (Lu et al., 2022b, algorithm 1, r = 1/2)."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    draw = noise_sampler or default_noise_sampler(x)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.tell(i, x, denoised)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        if sigma_down:
            sigma_mid = math.sqrt(sigma * sigma_down)
            denoised = steps.denoise(first_order(x, denoised, sigma, sigma_mid), sigma_mid)
        x = first_order(x, denoised, sigma, sigma_down)
        if sigma_up:
            x = x + sigma_up * s_noise * draw(sigma, sigma_next)
    return x


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> torch.Tensor:
    """DPM-Solver++(2S) as an SDE: noise also in the middle, at the share r of the step, along a Brownian path."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    draw = noise_sampler or BrownianTreeNoiseSampler(x, *steps.range)
    fac = 1 / (2 * r)
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.tell(i, x, denoised)
        if not sigma_next:
            x = denoised
            continue
        sigma_mid = sigma ** (1 - r) * sigma_next**r
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_mid, eta)
        x_mid = first_order(x, denoised, sigma, sigma_down)
        if sigma_up:
            x_mid = x_mid + sigma_up * s_noise * draw(sigma, sigma_mid)
        denoised = torch.lerp(denoised, steps.denoise(x_mid, sigma_mid), fac)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        x = first_order(x, denoised, sigma, sigma_down)
        if sigma_up:
            x = x + sigma_up * s_noise * draw(sigma, sigma_next)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022b, algorithm 2)."""
    return sample_dpmpp_2m_sde(model, x, sigmas, extra_args, callback, disable, eta=0.0)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> torch.Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022b, section 5.2).

    Args:
        solver_type: `midpoint` takes phi_1 / 2 for phi_2, which agrees in the second order, as published; `heun` phi_2.

    Raises:
        ValueError: it is neither.
    """
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type: '{solver_type}' is none of {', '.join(SOLVER_TYPES)}")
    return _multistep(2, model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, solver_type)


@torch.no_grad()
def sample_dpmpp_3m_sde(
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
    """SDE-DPM-Solver++(3M).

    It takes the second derivative whole, of which upstream takes half and so loses an order.
    """
    return _multistep(3, model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, "heun")


def _multistep(
    order: int,
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    eta: float,
    s_noise: float,
    noise_sampler: NoiseSampler | None,
    solver_type: str,
) -> torch.Tensor:
    """The module's formula, with derivatives from the D of the last `order` steps."""
    steps = Steps(model, x, sigmas, extra_args, callback, disable)
    draw = noise_sampler or (BrownianTreeNoiseSampler(x, *steps.range) if eta else None)
    known: list[tuple[float, torch.Tensor]] = []  # (lambda, D) of the last steps, the newest first
    for i, sigma, sigma_next in steps:
        denoised = steps.denoise(x, sigma)
        steps.tell(i, x, denoised)
        if not sigma_next:
            x = denoised
            continue
        known = [(-math.log(sigma), denoised), *known][:order]
        h = math.log(sigma / sigma_next)
        u = (1 + eta) * h
        factors = phi(u) if solver_type == "heun" else (phi(u)[0], phi(u)[0] / 2)
        x = math.exp(-u) * x
        for factor, term in zip(factors, derivatives(known, h), strict=False):
            x = x + factor * term
        if eta:
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * draw(sigma, sigma_next)
    return x


def derivatives(known: list[tuple[float, torch.Tensor]], h: float) -> list[torch.Tensor]:
    """D, h dD/dlambda and h^2 d^2D/dlambda^2, as many as (lambda, D) of steps are known, by divided differences."""
    (first, now), *before = known
    if not before:
        return [now]
    r0 = (first - before[0][0]) / h
    slope = (now - before[0][1]) / r0
    if len(before) == 1:
        return [now, slope]
    r1 = (before[0][0] - before[1][0]) / h
    bend = (slope - (before[0][1] - before[1][1]) / r1) / (r0 + r1)
    return [now, slope + r0 * bend, 2 * bend]
