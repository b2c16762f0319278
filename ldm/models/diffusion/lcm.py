"""The sampler of latent consistency models (Luo et al., 2023, arXiv:2310.04378): few steps, each of them to the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldm.errors import UserError
from ldm.models.diffusion.sampling import Run, Sampler

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


def boundary(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_skip, c_out) at timesteps t, by which f(x, t) = c_skip x + c_out x_0(x, t) is x at t = 0.

    Song et al. (2023), eq. 5, with the time 10 t and data of standard deviation 1/2 (Luo et al., 2023, appendix).
    """
    time = TIMESTEP_SCALING * t.double()
    total = time**2 + SIGMA_DATA**2
    return (SIGMA_DATA**2 / total).float(), (time / total.sqrt()).float()


class LCMSampler(Sampler):
    """x_0 in one step, noised anew and denoised again as often as there are steps (Luo et al., 2023, algorithm 3).

    For models that were distilled to know x_0 at once, such as Flash Diffusion's students; without guidance.

    Args:
        original_steps: the grid of timesteps, even from the noisiest, of which the steps are chosen.
    """

    name = "LCM"

    def __init__(self, model: Any, schedule: str = "linear", *, original_steps: int = 50) -> None:
        super().__init__(model, schedule)
        if not 1 <= original_steps <= self.ddpm_num_timesteps:
            raise UserError(f"LCM: original_steps {original_steps} is not within 1 .. {self.ddpm_num_timesteps}")
        self.original_steps = original_steps

    def make_schedule(self, steps: int, *, ddim_eta: float = 0.0) -> None:
        """Choose the timesteps: `steps` of the grid's, evenly by their places in it, the noisiest first."""
        if ddim_eta:
            raise UserError(f"LCM has no eta: ddim_eta must be 0, not {ddim_eta}; use DDIM")
        if not 1 <= steps <= self.original_steps:
            raise UserError(f"sampling steps: {steps} is not within 1 .. {self.original_steps}, those of LCM")
        stride = self.ddpm_num_timesteps // self.original_steps
        grid = np.arange(self.original_steps, 0, -1) * stride - 1
        places = np.floor(np.linspace(0, len(grid), steps, endpoint=False)).astype(int)
        device = self.model.betas.device
        self.steps, self.timesteps = steps, torch.as_tensor(grid[places], device=device)
        abar = self.model.alphas_cumprod.double()[self.timesteps]
        self.alphas, self.sigmas = abar.sqrt().float(), (1 - abar).sqrt().float()
        self.skips, self.outs = boundary(self.timesteps)

    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        places = range(self.steps - run.steps, self.steps)
        for i, place in enumerate(self.bar(places, run.steps, run)):
            t = self.timesteps[place].expand(len(x))
            x = self.keep_known(x, t, run)
            x0 = run.denoiser.x0(x, t, self.alphas[place], self.sigmas[place])
            x0 = self.skips[place] * x + self.outs[place] * x0
            x = x0
            if place + 1 < self.steps:
                noise = run.temperature * self.normal(x0)
                x = self.alphas[place + 1] * x0 + self.sigmas[place + 1] * noise
            run.watch(i, x, x0)
        return x, run.watch.intermediates

    @torch.no_grad()
    def stochastic_encode(
        self, x0: torch.Tensor, t: torch.Tensor | int, noise: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x0 noised so that the last `t` steps of the schedule are left; t = S starts from the highest noise."""
        place = self.steps - int(torch.as_tensor(t).reshape(-1)[0])
        noise = self.normal(x0) if noise is None else noise
        return self.alphas[place] * x0 + self.sigmas[place] * noise
