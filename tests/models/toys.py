"""Toy models in place of networks, under which the originals' samplers were run for the reference numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.goldens.fill import data

GOLDENS = np.load("tests/goldens/samplers.npz")
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
C, UC, X_T = data("c", (2, 3, 8), 0.5), data("uc", (2, 3, 8), 0.5), data("xT", (2, 4, 8, 8))
QUIET: dict[str, Any] = dict(verbose=False, show_progress=False)


class Model:
    """A schedule and a formula in place of a network."""

    parameterization = "eps"
    num_timesteps = 1000

    def __init__(self, formula: Callable) -> None:
        self.betas = BETAS.float()
        self.alphas_cumprod = torch.cumprod(1 - BETAS, 0).float()
        self.apply_model = formula

    def q_sample(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt() * x + (1 - abar).sqrt() * noise


def toy(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The noise that the reference numbers were made with."""
    return torch.tanh(0.8 * x + 0.002 * t.view(-1, 1, 1, 1) + c.mean(dim=(1, 2)).view(-1, 1, 1, 1))


def run(sampler: Any, model: Model, S: int, scale: float = 1.0, **kwargs: Any) -> torch.Tensor:
    """Samples of S steps from the reference numbers' start."""
    settings = dict(conditioning=C, x_T=X_T, unconditional_conditioning=UC) | QUIET | kwargs
    return sampler(model).sample(S, 2, (4, 8, 8), unconditional_guidance_scale=scale, **settings)[0]


def assert_golden(x: torch.Tensor, name: str) -> None:
    golden = torch.from_numpy(GOLDENS[name])
    assert (x - golden).abs().max() <= 1e-3 * golden.abs().max()
