"""Learning-rate multipliers by step, for `torch.optim.lr_scheduler.LambdaLR`: pass `.schedule`."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import accumulate

from ldm.errors import UserError


class LambdaWarmUpCosineScheduler:
    """Linear from `lr_start` to `lr_max` in `warm_up_steps`, then a half cosine to `lr_min` at `max_decay_steps`.

    Use it with a base learning rate of 1.0.

    Args:
        verbosity_interval: unused.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps = warm_up_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start
        self.max_decay_steps = max_decay_steps

    def schedule(self, n: int) -> float:
        """The multiplier at step `n`, from 0."""
        if n < self.warm_up_steps:
            return (self.lr_max - self.lr_start) / self.warm_up_steps * n + self.lr_start
        progress = (n - self.warm_up_steps) / max(1, self.max_decay_steps - self.warm_up_steps)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(min(progress, 1.0) * math.pi))

    __call__ = schedule


class LambdaInverseScheduler:
    """(1 + n / inv_gamma) ** -power at step n, after an exponential warm-up; with power 0, constant after it.

    Args:
        inv_gamma: steps in which the multiplier falls to 2 ** -power. power: of the fall.
        warmup: what is lacking of the whole after each step, as a share of what lacked before it; 0 for no warm-up.
        min_value: the least that it falls to, the warm-up apart.

    Raises:
        UserError: a number is out of its range.
    """

    def __init__(self, inv_gamma: float = 1.0, power: float = 1.0, warmup: float = 0.0, min_value: float = 0.0) -> None:
        if not 0 <= warmup < 1 or inv_gamma <= 0 or power < 0:
            raise UserError(
                f"yaml: {type(self).__name__}: needs inv_gamma above 0, power of at least 0 and warmup in [0, 1), not "
                f"{inv_gamma}, {power} and {warmup}"
            )
        self.inv_gamma, self.power, self.warmup, self.min_value = inv_gamma, power, warmup, min_value

    def decay(self, n: int) -> float:
        """The multiplier at step `n`, the warm-up apart."""
        return (1 + n / self.inv_gamma) ** -self.power

    def schedule(self, n: int) -> float:
        """The multiplier at step `n`, from 0."""
        return (1 - self.warmup ** (n + 1)) * max(self.min_value, self.decay(n))

    __call__ = schedule


class LambdaExponentialScheduler(LambdaInverseScheduler):
    """`decay` ** (n / `num_steps`) at step n, after an exponential warm-up."""

    def __init__(self, num_steps: float, decay: float = 0.5, warmup: float = 0.0, min_value: float = 0.0) -> None:
        super().__init__(inv_gamma=num_steps, warmup=warmup, min_value=min_value)
        if not 0 < decay <= 1:
            raise UserError(f"yaml: {type(self).__name__}: decay is {decay}; it must lie in (0, 1]")
        self.factor = decay

    def decay(self, n: int) -> float:
        return self.factor ** (n / self.inv_gamma)

    __call__ = LambdaInverseScheduler.schedule


class LambdaWarmUpCosineScheduler2:
    """Repeated cycles, each with its own warm-up and half cosine; every argument is a list, one entry a cycle.

    In cycle i the multiplier rises from `f_start[i]` to `f_max[i]` in `warm_up_steps[i]` steps and falls to
    `f_min[i]` at the end of `cycle_lengths[i]`.

    Args:
        warm_up_steps, f_min, f_max, f_start: a number a cycle. cycle_lengths: in steps. verbosity_interval: unused.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        if len({len(v) for v in lists.values()}) != 1 or not cycle_lengths:
            sizes = ", ".join(f"{k} has {len(v)}" for k, v in lists.items())
            raise UserError(f"yaml: {type(self).__name__}: one entry a cycle is needed in every list; {sizes}")
        self.warm_up_steps = list(warm_up_steps)
        self.f_min, self.f_max, self.f_start = list(f_min), list(f_max), list(f_start)
        self.cycle_lengths = list(cycle_lengths)
        self.cycle_ends = list(accumulate(self.cycle_lengths))

    def schedule(self, n: int) -> float:
        """The multiplier at step `n`, from 0; after the last cycle its final value."""
        cycle = min(bisect.bisect_left(self.cycle_ends, n), len(self.cycle_ends) - 1)
        n = min(n - (self.cycle_ends[cycle] - self.cycle_lengths[cycle]), self.cycle_lengths[cycle])
        if n < self.warm_up_steps[cycle]:
            return self.f_start[cycle] + (self.f_max[cycle] - self.f_start[cycle]) / self.warm_up_steps[cycle] * n
        return self._decay(cycle, n)

    def _decay(self, cycle: int, n: int) -> float:
        warm_up = self.warm_up_steps[cycle]
        progress = min((n - warm_up) / max(1, self.cycle_lengths[cycle] - warm_up), 1.0)
        span = self.f_max[cycle] - self.f_min[cycle]
        return self.f_min[cycle] + 0.5 * span * (1 + math.cos(progress * math.pi))

    __call__ = schedule


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Repeated cycles of a linear warm-up and a linear decay to `f_min`; with f_min = f_max, constant after it."""

    def _decay(self, cycle: int, n: int) -> float:
        left = (self.cycle_lengths[cycle] - n) / self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * left

    __call__ = LambdaWarmUpCosineScheduler2.schedule
