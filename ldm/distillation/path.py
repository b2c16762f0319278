"""The teacher's way: from one of K timesteps to the clean sample, by DPM-Solver++ 2M."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ldm.distillation.denoisers import Schedule
from ldm.models.diffusion.dpm_solver.solver import Known, Solver
from ldm.models.diffusion.dpm_solver.spacing import Point

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
END = Point(0.0, 1.0, 0.0, math.inf)


def trailing(num_timesteps: int, steps: int) -> list[int]:
    """`steps` of the timesteps 0 .. num_timesteps - 1, evenly apart down from the last (Lin et al., 2024, table 2)."""
    return [round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)]


class TeacherPath:
    """From any of K timesteps through all that follow it; the last step goes to no noise.

    Args:
        schedule: the teacher's. steps: K.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self.timesteps = trailing(len(schedule), steps)
        levels = [schedule.level(t) for t in self.timesteps]
        self.points = [
            Point(float(t), alpha, sigma, math.log(alpha / sigma) if alpha else -math.inf)  # of pure noise
            for t, (alpha, sigma) in zip(self.timesteps, levels, strict=True)
        ]
        self.points.append(END)
        self.solver = Solver(data=True)

    def begin(self, x_start: torch.Tensor, noise: torch.Tensor, start: int) -> torch.Tensor:
        """x_start noised to the place `start`; at the first it is pure noise, from which samplers begin."""
        point = self.points[start]
        return noise if start == 0 else point.alpha * x_start + point.sigma * noise

    def __call__(self, predict: Predict, x: torch.Tensor, start: int) -> torch.Tensor:
        """The clean sample that x [B, ...] at the place `start` leads to, in K - start steps.

        Args:
            predict: (x, timesteps [B]) -> x_0, guided.
        """
        known: list[Known] = []
        for here, end in zip(self.points[start:-1], self.points[start + 1 :], strict=True):
            t = torch.full((len(x),), int(here.time), device=x.device)
            known = [(here, predict(x, t)), *known][:2]
            x = known[0][1] if end is END else self.solver.multistep(x, end, known)
        return x
