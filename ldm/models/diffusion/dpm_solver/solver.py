"""The solvers' arithmetic: one exponential integrator, read as noise (DPM-Solver) or data prediction (++).

With lam = log(alpha / sigma) as time, the linear part of the diffusion ODE is solved exactly and the prediction is
expanded in powers of lam. For a step of h in lam both solvers then have the form

    x_end = ratio x - weight (psi_1(u) D0 + psi_2(u) D1 + psi_3(u) D2),   psi_1(u) = exp(u) - 1,
    psi_{k+1}(u) = psi_k(u) / u - 1 / k!,

where D0 is the prediction, D1 = h dD/dlam and D2 = h^2 d^2D/dlam^2 at the beginning. DPM-Solver predicts the noise:
u = h, ratio = alpha_end / alpha, weight = sigma_end (Lu et al., 2022a, eq. 3.5). DPM-Solver++ predicts x_0: u = -h,
ratio = sigma_end / sigma, weight = alpha_end (Lu et al., 2022b, eq. 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1

import torch

from ldm.models.diffusion.dpm_solver.spacing import ContinuousTime, Point

Predict = Callable[[torch.Tensor, Point], torch.Tensor]
Known = tuple[Point, torch.Tensor]  # where the network was asked, and what it predicted


def psi(u: float) -> tuple[float, float, float]:
    """psi_1, psi_2 and psi_3 of the module's formula, for u != 0."""
    first = expm1(u)
    second = first / u - 1.0
    return first, second, second / u - 0.5


@dataclass(frozen=True)
class Solver:
    """DPM-Solver++ with `data`, DPM-Solver without: single updates of either kind, of orders 1 to 3.

    Only singlestep updates need `time`: they ask the network between two points.
    """

    data: bool
    time: ContinuousTime | None = None

    def advance(
        self, x: torch.Tensor, start: Point, end: Point, *terms: torch.Tensor, half: bool = False
    ) -> torch.Tensor:
        """x at `end` from x at `start` and D0, D1, ... there; `half` takes psi_1 / 2 for psi_2.

        Both agree in the second order; the published second-order updates take the half.
        """
        h = end.lam - start.lam
        if self.data:
            u, ratio, weight = -h, end.sigma / start.sigma, end.alpha
        else:
            u, ratio, weight = h, end.alpha / start.alpha, end.sigma
        factors = psi(u)
        if half:
            factors = (factors[0], factors[0] / 2)
        out = ratio * x
        for factor, term in zip(factors, terms, strict=False):
            out = out - (weight * factor) * term
        return out

    def multistep(self, x: torch.Tensor, end: Point, known: Sequence[Known]) -> torch.Tensor:
        """An update of order len(known) from the predictions so far, the newest first (Lu et al., 2022b, alg. 2).

        The third order takes D2 whole, where the published code takes its half and so loses the order.
        """
        points, values = zip(*known, strict=True)
        start, h = points[0], end.lam - points[0].lam
        if len(known) == 1:
            return self.advance(x, start, end, values[0])
        r0 = (points[0].lam - points[1].lam) / h
        slope = (values[0] - values[1]) / r0
        if len(known) == 2:
            return self.advance(x, start, end, values[0], slope, half=True)
        r1 = (points[1].lam - points[2].lam) / h
        bend = (slope - (values[1] - values[2]) / r1) / (r0 + r1)  # half of D2
        return self.advance(x, start, end, values[0], slope + r0 * bend, 2.0 * bend)

    def singlestep(
        self, x: torch.Tensor, start: Point, end: Point, order: int, now: torch.Tensor, predict: Predict
    ) -> torch.Tensor:
        """An update of `order` from the prediction `now` at `start` and order - 1 more inside the step.

        They lie at h / 2, or at h / 3 and 2 h / 3 (Lu et al., 2022a, algorithms 1 and 2).
        """
        if order == 1:
            return self.advance(x, start, end, now)
        h = end.lam - start.lam
        if order == 2:
            middle = self.time.at_lam(start.lam + h / 2)
            slope = (predict(self.advance(x, start, middle, now), middle) - now) * 2.0
            return self.advance(x, start, end, now, slope, half=True)
        third, two_thirds = (self.time.at_lam(start.lam + h * k / 3) for k in (1, 2))
        slope = predict(self.advance(x, start, third, now), third) - now  # over h / 3
        slope = predict(self.advance(x, start, two_thirds, now, 2.0 * slope), two_thirds) - now  # over 2 h / 3
        return self.advance(x, start, end, now, 1.5 * slope)


def clipped(x0: torch.Tensor, share: float = 0.995, largest: float = 1.0) -> torch.Tensor:
    """Dynamic thresholding (Saharia et al., 2022): each sample [C, H, W] of x0 brought within +-`largest`.

    Everything beyond s, the quantile `share` of the sample's absolute values, is cut; s > largest shrinks the rest.
    """
    s = torch.quantile(x0.flatten(1).abs().float(), share, dim=1).clamp(min=largest)
    s = s.view(-1, *([1] * (x0.ndim - 1))).to(x0.dtype)
    return x0.clamp(-s, s) * (largest / s)
