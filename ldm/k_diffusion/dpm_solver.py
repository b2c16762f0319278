"""DPM-Solver (Lu et al., 2022a) in sigma: a given number of evaluations, or steps as large as the error allows.

With x = x_0 + sigma eps, alpha is 1 and lambda = -log sigma. Both samplers end at sigma_min, not at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ldm.k_diffusion.noise import NoiseSampler, default_noise_sampler
from ldm.k_diffusion.steps import Callback, Model, get_ancestral_step, to_d
from ldm.models.diffusion.dpm_solver.solver import Solver
from ldm.models.diffusion.dpm_solver.spacing import Point, singlestep_orders


class NoiseLevels:
    """Points of x = x_0 + sigma eps, for `Solver`."""

    def at_lam(self, lam: float) -> Point:
        """The point at a half log-SNR, which is also its time."""
        return Point(lam, 1.0, math.exp(-lam), lam)

    def at_sigma(self, sigma: float) -> Point:
        """The point at a level of noise, above 0."""
        return Point(-math.log(sigma), 1.0, sigma, -math.log(sigma))


@dataclass
class Descent:
    """What both samplers do in a step: the noise that it adds, the network's call, the callback."""

    model: Model
    x: torch.Tensor
    sigma_min: float
    sigma_max: float
    extra_args: Mapping[str, Any] | None
    callback: Callback | None
    eta: float
    s_noise: float
    noise_sampler: NoiseSampler | None

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g}, sigma_max {self.sigma_max:g}: must be above 0 and rise")
        self.draw = self.noise_sampler or default_noise_sampler(self.x)
        self.levels = NoiseLevels()
        self.start, self.end = (self.levels.at_sigma(float(sigma)) for sigma in (self.sigma_max, self.sigma_min))
        self.solver = Solver(False, self.levels)

    def eps(self, x: torch.Tensor, point: Point) -> torch.Tensor:
        """The noise in x, which is also dx/dsigma."""
        return to_d(x, point.sigma, self.model(x, x.new_full([len(x)], point.sigma), **(self.extra_args or {})))

    def tell(self, i: int, x: torch.Tensor, eps: torch.Tensor, here: Point, **more: float) -> None:
        """Call the callback, with tensors for what others also give."""
        if self.callback is not None:
            sigma = x.new_full((), here.sigma)
            info = {"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x - here.sigma * eps, "t": here.lam}
            self.callback(info | more)

    def target(self, here: Point, there: Point) -> tuple[Point, float]:
        """Where the solver steps to on the way to `there`, and how much noise then comes on top; not below the end."""
        down, _ = get_ancestral_step(here.sigma, there.sigma, self.eta)
        down = max(down, self.end.sigma)
        return self.levels.at_sigma(down), max(there.sigma**2 - down**2, 0.0) ** 0.5

    def noised(self, x: torch.Tensor, up: float, here: Point, there: Point) -> torch.Tensor:
        """x with the noise of a step."""
        return x + up * self.s_noise * self.draw(here.sigma, there.sigma) if up else x


@torch.no_grad()
def sample_dpm_fast(
    model: Model,
    x: torch.Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """DPM-Solver-fast (Lu et al., 2022a, section 3.4): steps of order 3, and a lower one, that take n evaluations."""
    way = Descent(model, x, sigma_min, sigma_max, extra_args, callback, eta, s_noise, noise_sampler)
    orders = singlestep_orders(3, n)
    lams = [way.start.lam + (way.end.lam - way.start.lam) * i / len(orders) for i in range(len(orders) + 1)]
    points = [way.start, *(way.levels.at_lam(lam) for lam in lams[1:-1]), way.end]
    for i, order in enumerate(tqdm(orders, disable=disable)):
        here, there = points[i], points[i + 1]
        eps = way.eps(x, here)
        way.tell(i, x, eps, here)
        down, up = way.target(here, there)
        x = way.noised(way.solver.singlestep(x, here, down, order, eps, way.eps), up, here, there)
    return x


@dataclass
class PIDStepSizeController:
    """A controller of step sizes, proportional, integral and derivative in the log of the error (Hairer & Wanner).

    Args:
        h: the size of the next step. order: the lower one of the two solutions that are compared.
        accept_safety: a step is taken when the next one would be at least so much of it.
    """

    h: float
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    order: float = 1.0
    accept_safety: float = 0.81
    eps: float = 1e-8
    errors: list[float] = field(default_factory=list)  # inverse ones of the last two steps taken, the newest first

    def propose_step(self, error: float) -> bool:
        """Whether a step with this error (1 is what is allowed) stands; sets the size of the next one."""
        inverse = 1 / (error + self.eps)
        before, first = self.errors or [inverse] * 2
        exponents = (self.pcoeff + self.icoeff + self.dcoeff, -(self.pcoeff + 2 * self.dcoeff), self.dcoeff)
        terms = zip((inverse, before, first), exponents, strict=True)
        factor = math.prod(value ** (exponent / self.order) for value, exponent in terms)
        factor = 1 + math.atan(factor - 1)  # smoothly within 0.21 and 2.57
        accept = factor >= self.accept_safety
        self.errors = [inverse, before] if accept else [before, first]
        self.h *= factor
        return accept


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model,
    x: torch.Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, int]]:
    """DPM-Solver-12 or -23 (Lu et al., 2022a, appendix C): a solution of the order below says how large steps may be.

    All of a batch takes the same steps, so that a picture does depend on those beside it; draw them one by one.

    Args:
        order: 2 or 3. rtol, atol: error allowed in a step, relative to x and absolute.
        h_init: the first step, in log sigma. pcoeff, icoeff, dcoeff, accept_safety: `PIDStepSizeController`'s.
        return_info: also return the counts steps, nfe (evaluations), n_accept and n_reject.
    """
    if order not in (2, 3):
        raise ValueError(f"order {order}: must be 2 or 3")
    way = Descent(model, x, sigma_min, sigma_max, extra_args, callback, eta, s_noise, noise_sampler)
    control = PIDStepSizeController(abs(h_init), pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    here, x_prev, eps = way.start, x, None
    with tqdm(disable=disable) as bar:
        while here.lam < way.end.lam - 1e-5:
            if eps is None:
                eps = way.eps(x, here)
                info["nfe"] += 1
            rest = way.end.lam - here.lam
            there = way.levels.at_lam(here.lam + control.h) if control.h < rest else way.end
            down, up = way.target(here, there)
            low, high = _pair(way, x, here, down, order, eps)
            allowed = torch.maximum(low.abs(), x_prev.abs()).mul(rtol).clamp(min=atol)
            error = float(((low - high) / allowed).square().mean().sqrt())
            accept, step = control.propose_step(error), here
            way.tell(info["steps"], x, eps, here, error=error, h=control.h)
            info["steps"] += 1
            info["nfe"] += order - 1
            info["n_accept" if accept else "n_reject"] += 1
            if accept:
                x_prev, here, eps = low, there, None
                x = way.noised(high, up, step, there)
            bar.update()
    return (x, info) if return_info else x


def _pair(
    way: Descent, x: torch.Tensor, here: Point, there: Point, order: int, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x at `there` by the order below and by `order`, which share their evaluations."""
    advance = way.solver.advance
    if order == 2:
        return advance(x, here, there, eps), way.solver.singlestep(x, here, there, 2, eps, way.eps)
    inner: list[torch.Tensor] = []

    def remembered(value: torch.Tensor, point: Point) -> torch.Tensor:
        inner.append(way.eps(value, point))
        return inner[-1]

    high = way.solver.singlestep(x, here, there, 3, eps, remembered)
    return advance(x, here, there, eps, 3 * (inner[0] - eps), half=True), high  # the first lies at a third
