"""DPM-Solver (Lu et al., 2022a) step by step, under upstream's names: the class that `DPMSolver` is there.

Times are t = -log sigma, as tensors. The ways of many steps are those of `ldm.k_diffusion.dpm_solver`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ldm.k_diffusion.dpm_solver import NoiseLevels, sample_dpm_adaptive, sample_dpm_fast
from ldm.k_diffusion.noise import NoiseSampler
from ldm.k_diffusion.steps import Callback, Model
from ldm.models.diffusion.dpm_solver.solver import Solver

Cache = dict[str, torch.Tensor]  # what the network said in a step, by upstream's names: eps, eps_r1, eps_r2
Stepped = tuple[torch.Tensor, Cache]  # x at the end of a step, and what the network said in it


class DPMSolver(nn.Module):
    """Single steps of orders 1 to 3, and ways of many, for a denoiser `model(x, sigma[B], **extra_args)`.

    Args:
        eps_callback: called, with nothing, at every evaluation of the network.
        info_callback: called in every step of a way with a dict of x, i, t, denoised and more.
    """

    def __init__(
        self,
        model: Model,
        extra_args: Mapping[str, Any] | None = None,
        eps_callback: Callable[[], Any] | None = None,
        info_callback: Callback | None = None,
    ) -> None:
        super().__init__()
        self.model, self.extra_args = model, dict(extra_args or {})
        self.eps_callback, self.info_callback = eps_callback, info_callback
        self.levels, self.solver = NoiseLevels(), Solver(False)

    def t(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time of a level of noise."""
        return -sigma.log()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The level of noise at a time."""
        return t.neg().exp()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """D(x, sigma), counted."""
        denoised = self.model(x, sigma, **kwargs)
        if self.eps_callback is not None:
            self.eps_callback()
        return denoised

    def eps(self, eps_cache: Cache, key: str, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Stepped:
        """The noise in x at t, remembered under `key`; what is there already is not asked for again."""
        if key in eps_cache:
            return eps_cache[key], eps_cache
        sigma = self.sigma(t)
        eps = (x - self.denoise(x, x.new_ones(len(x)) * sigma, **self.extra_args, **kwargs)) / sigma
        return eps, {key: eps, **eps_cache}

    def advance(
        self, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, *terms: torch.Tensor, half: bool = False
    ) -> torch.Tensor:
        """x at t_next from the noise at t and its derivatives; see `Solver.advance`."""
        return self.solver.advance(
            x, self.levels.at_lam(float(t)), self.levels.at_lam(float(t_next)), *terms, half=half
        )

    def dpm_solver_1_step(
        self, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, eps_cache: Cache | None = None
    ) -> Stepped:
        """A step of first order (DDIM's)."""
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        return self.advance(x, t, t_next, eps), cache

    def dpm_solver_2_step(
        self, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, r1: float = 1 / 2, eps_cache: Cache | None = None
    ) -> Stepped:
        """A step of second order, which also looks at the share r1 of it."""
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        inner = t + r1 * (t_next - t)
        eps_r1, cache = self.eps(cache, "eps_r1", self.advance(x, t, inner, eps), inner)
        return self.advance(x, t, t_next, eps, (eps_r1 - eps) / r1, half=True), cache

    def dpm_solver_3_step(
        self, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, r1: float = 1 / 3, r2: float = 2 / 3,
        eps_cache: Cache | None = None,
    ) -> Stepped:  # fmt: skip
        """A step of third order where r2 is 2/3, which also looks at the shares r1 and r2 of it."""
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        first, second = (t + r * (t_next - t) for r in (r1, r2))
        eps_r1, cache = self.eps(cache, "eps_r1", self.advance(x, t, first, eps), first)
        there = self.advance(x, t, second, eps, (eps_r1 - eps) * (r2 / r1))
        eps_r2, cache = self.eps(cache, "eps_r2", there, second)
        return self.advance(x, t, t_next, eps, (eps_r2 - eps) / r2), cache

    def dpm_solver_fast(
        self,
        x: torch.Tensor,
        t_start: torch.Tensor,
        t_end: torch.Tensor,
        nfe: int,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> torch.Tensor:
        """From t_start to a later t_end, which has less noise, in nfe evaluations: `sample_dpm_fast`."""
        ends = float(self.sigma(t_end)), float(self.sigma(t_start))
        return sample_dpm_fast(
            self.denoise, x, *ends, nfe, self.extra_args, self.info_callback, True, eta, s_noise, noise_sampler
        )

    def dpm_solver_adaptive(
        self, x: torch.Tensor, t_start: torch.Tensor, t_end: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """From t_start to a later t_end in steps by the error, and their counts; more as `sample_dpm_adaptive`'s."""
        ends = float(self.sigma(t_end)), float(self.sigma(t_start))
        return sample_dpm_adaptive(
            self.denoise, x, *ends, self.extra_args, self.info_callback, True, *args, return_info=True, **kwargs
        )
