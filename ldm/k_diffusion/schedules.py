"""Noise schedules: falling levels of noise sigma, [n + 1] numbers of which the last is 0."""

from __future__ import annotations

import math

import torch

from ldm.errors import UserError


def append_zero(x: torch.Tensor) -> torch.Tensor:
    """`x` [n] and a 0 behind it."""
    return torch.cat([x, x.new_zeros([1])])


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """n levels, evenly apart in sigma^(1 / rho) (Karras et al., 2022, eq. 5).

    Raises:
        UserError: there is no such schedule, as for all of these.
    """
    _check(n, sigma_min, sigma_max)
    if rho <= 0:
        raise UserError(f"rho {rho:g}: must be above 0")
    roots = torch.lerp(*_ends(sigma_max ** (1 / rho), sigma_min ** (1 / rho)), _ramp(n))
    return _levels(roots**rho, device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """n levels, evenly apart in log sigma."""
    return get_sigmas_polyexponential(n, sigma_min, sigma_max, 1.0, device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """n levels, whose log sigma follows the power rho of a ramp; above 1 there are more low ones."""
    _check(n, sigma_min, sigma_max)
    if rho <= 0:
        raise UserError(f"rho {rho:g}: must be above 0")
    logs = torch.lerp(*_ends(math.log(sigma_min), math.log(sigma_max)), (1 - _ramp(n)) ** rho)
    return _levels(logs.exp(), device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """n levels of the continuous VP process, evenly apart in its time, 1 to eps_s (Karras et al., 2022, table 1)."""
    if n < 1:
        raise UserError(f"sampling steps: {n}: must be at least 1")
    t = torch.lerp(*_ends(1.0, eps_s), _ramp(n))
    return _levels(torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt(), device)


def vp_between(sigma_min: float, sigma_max: float) -> tuple[float, float, float]:
    """(beta_d, beta_min, eps_s) of the VP process at the speed that has sigma_max at time 1 and sigma_min at eps_s."""
    _check(1, sigma_min, sigma_max)
    beta_d, beta_min = 19.9, 0.1
    speed = math.log1p(sigma_max**2) / (beta_d / 2 + beta_min)
    beta_d, beta_min = speed * beta_d, speed * beta_min
    eps_s = (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma_min**2)) - beta_min) / beta_d
    return beta_d, beta_min, eps_s


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise UserError(f"sampling steps: {n}: must be at least 1")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise UserError(f"sigma_min {sigma_min:g}, sigma_max {sigma_max:g}: must be above 0, the second the larger")


def _ramp(n: int) -> torch.Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _ends(first: float, last: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(first, dtype=torch.float64), torch.tensor(last, dtype=torch.float64)


def _levels(sigmas: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    levels = append_zero(sigmas.float())
    if (levels.diff() >= 0).any():
        raise UserError("schedule: some levels of noise are the same; take fewer steps, or another rho")
    return levels.to(device)
