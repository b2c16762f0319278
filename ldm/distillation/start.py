"""Where a batch begins: one of the teacher's K timesteps, drawn from a mixture of modes, and the phases of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.errors import UserError


def start_probabilities(steps: int, modes: Sequence[float], variance: float) -> torch.Tensor:
    """Probabilities [K] of the start indices 0 .. K - 1, of which 0 is pure noise (Chadebec et al., 2024, section 3.3).

    Proportional to the sum over the n modes m of w_m exp(-(i - m K / n)^2 / variance).

    Args:
        steps: K. modes: the weights w_m. variance: of each mode, in indices.
    """
    indices = torch.arange(steps, dtype=torch.float64)
    centres = torch.arange(len(modes), dtype=torch.float64) * steps / len(modes)
    bumps = torch.exp(-((indices[:, None] - centres) ** 2) / variance)
    density = bumps @ torch.tensor(modes, dtype=torch.float64)
    return density / density.sum()


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Args:
        steps: how long it lasts, in optimiser steps; the last phase lasts to the end.
        modes: the weight of each mode of the start, the noisiest first.
        distillation, matching, adversarial: weights of the terms of the loss.
    """

    steps: int
    modes: tuple[float, ...]
    distillation: float = 1.0
    matching: float = 0.0
    adversarial: float = 0.0


def read_phases(sections: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Phases from the yaml's list.

    Raises:
        UserError: a key is unknown or lacking, or a number cannot be.
    """
    if not isinstance(sections, Sequence):
        raise UserError(f"yaml: model.params.phases is {sections!r}; it must be a list")
    known, needed = set(Phase.__dataclass_fields__), {"steps", "modes"}
    phases = []
    for number, section in enumerate(sections):
        where = f"yaml: model.params.phases[{number}]"
        if not isinstance(section, Mapping) or set(section) - known or needed - set(section):
            raise UserError(
                f"{where}: holds {section}; it needs steps and modes, and may hold {', '.join(sorted(known))}"
            )
        try:
            phase = Phase(**{**section, "modes": tuple(float(weight) for weight in section["modes"])})
            weights = (*phase.modes, phase.distillation, phase.matching, phase.adversarial)
            possible = phase.steps >= 1 and min(weights) >= 0 and sum(phase.modes) > 0
        except (TypeError, ValueError):  # words where numbers or lists belong
            possible = False
        if not possible:
            raise UserError(f"{where}: steps must be at least 1, weights at least 0, modes a list with one above 0")
        phases.append(phase)
    if not phases:
        raise UserError("yaml: model.params.phases: at least one phase is needed")
    return phases


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of an optimiser step, counted from 0."""
    for phase in phases[:-1]:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]
