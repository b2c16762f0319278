"""The trained timesteps as continuous time in [1/N, 1], and where a solver stops in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

SPACINGS = ("time_uniform", "time_quadratic", "logSNR")


class Point(NamedTuple):
    """A time and its x = alpha x_0 + sigma eps, with lam = log(alpha / sigma), half the log-SNR."""

    time: float
    alpha: float
    sigma: float
    lam: float


@dataclass(frozen=True)
class ContinuousTime:
    """Between the N trained timesteps log alpha is interpolated linearly (Lu et al., 2022a, appendix D.4).

    Args:
        log_alphas: [N] float64, falling; timestep n is the time (n + 1) / N.
    """

    log_alphas: np.ndarray

    @classmethod
    def of(cls, model: Any) -> ContinuousTime:
        """That of a model with `alphas_cumprod`."""
        return cls(0.5 * np.log(model.alphas_cumprod.cpu().double().numpy()))

    @property
    def times(self) -> np.ndarray:
        """The trained timesteps' times, ascending."""
        return np.arange(1, len(self.log_alphas) + 1) / len(self.log_alphas)

    def at_time(self, time: float) -> Point:
        """The point at a time in [1/N, 1]."""
        log_alpha = float(np.interp(time, self.times, self.log_alphas))
        sigma = float(np.sqrt(-np.expm1(2.0 * log_alpha)))
        return Point(float(time), float(np.exp(log_alpha)), sigma, log_alpha - float(np.log(sigma)))

    def at_lam(self, lam: float) -> Point:
        """The point at a half log-SNR, which must lie within the trained ones."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * lam)
        return self.at_time(float(np.interp(log_alpha, self.log_alphas[::-1], self.times[::-1])))

    def timestep(self, point: Point) -> float:
        """What the network is told: 0 at 1/N, N - 1 at 1, fractions between."""
        total = len(self.log_alphas)
        return max(0.0, (point.time - 1.0 / total) * total)

    def spaced(self, spacing: str, steps: int) -> list[Point]:
        """steps + 1 points from 1 to 1/N: even in time, in its square root, or in the log-SNR."""
        if spacing == "logSNR":
            return self.even_in_lam(self.at_time(1.0), self.at_time(self.times[0]), steps)
        power = 2 if spacing == "time_quadratic" else 1
        times = np.linspace(1.0, self.times[0] ** (1 / power), steps + 1) ** power
        return [self.at_time(time) for time in times]

    def even_in_lam(self, first: Point, last: Point, steps: int) -> list[Point]:
        """steps + 1 points between two, both among them."""
        between = np.linspace(first.lam, last.lam, steps + 1)[1:-1]
        return [first, *(self.at_lam(lam) for lam in between), last]


def singlestep_orders(order: int, evaluations: int) -> list[int]:
    """The orders of single steps that take `evaluations` of the network together, the lower ones last.

    The last step of order 3 makes way for lower ones, which are steadier near the data (Lu et al., 2022a, D.3).
    """
    if order == 1:
        return [1] * evaluations
    if order == 2:
        return [2] * (evaluations // 2) + [1] * (evaluations % 2)
    whole = evaluations // 3
    return [3] * (whole - 1) + [2, 1] if evaluations % 3 == 0 else [3] * whole + [evaluations % 3]


def grouped(points: Sequence[Point], orders: Iterable[int]) -> list[Point]:
    """Of one point an evaluation, those at which the single steps of `orders` begin and end."""
    return [points[i] for i in accumulate(orders, initial=0)]
