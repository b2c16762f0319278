"""DDIM (Song et al., 2021): fewer steps of the trained process, deterministic at eta 0, ancestral at eta 1."""

from __future__ import annotations

import numpy as np
import torch

from ldm.models.diffusion.sampling import Run, Sampler, ddim_timesteps


class DDIMSampler(Sampler):
    """Deterministic at eta 0; with noise in its steps above."""

    name = "DDIM"

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the timesteps and compute every step's coefficients once (Song et al., 2021, eq. 12 and 16)."""
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps, ddim_discretize)
        abar = self.model.alphas_cumprod.cpu().double().numpy()
        alphas = abar[self.ddim_timesteps]
        previous = np.concatenate([abar[:1], alphas[:-1]])
        sigmas = ddim_eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
        self.steps, self.ddim_eta = len(alphas), ddim_eta

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.model.betas.device)

        self.ddim_alphas, self.ddim_alphas_prev = on_device(alphas), on_device(previous)
        self.ddim_sigmas = on_device(sigmas)
        self.ddim_sqrt_alphas = on_device(np.sqrt(alphas))
        self.ddim_sqrt_one_minus_alphas = on_device(np.sqrt(1.0 - alphas))
        self.ddim_direction = on_device(np.sqrt(1.0 - previous - sigmas**2))

    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        times = torch.as_tensor(self.ddim_timesteps, device=x.device)
        for i, index in enumerate(self.bar(reversed(range(run.steps)), run.steps, run)):
            t = times[index].expand(len(x))
            x = self.keep_known(x, t, run)
            alpha, sigma = self.ddim_sqrt_alphas[index], self.ddim_sqrt_one_minus_alphas[index]
            eps = run.denoiser.eps(x, t, alpha, sigma)
            x, pred_x0 = self.step(x, eps, index, run.temperature)
            run.watch(i, x, pred_x0)
        return x, run.watch.intermediates

    def step(
        self, x: torch.Tensor, eps: torch.Tensor, index: int, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x at the next lower timestep and x_0, from x at schedule place `index` and its noise (eq. 12)."""
        pred_x0 = (x - self.ddim_sqrt_one_minus_alphas[index] * eps) / self.ddim_sqrt_alphas[index]
        x = self.ddim_alphas_prev[index].sqrt() * pred_x0 + self.ddim_direction[index] * eps
        if self.ddim_eta:
            x = x + self.ddim_sigmas[index] * temperature * self.normal(x)
        return x, pred_x0

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: torch.Tensor,
        t: torch.Tensor | int,
        use_original_steps: bool = False,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0 noised to place t of the schedule (of the trained timesteps with use_original_steps).

        t may be the number of steps itself, strength 1: then it is noised to the last place.
        """
        noise = self.normal(x0) if noise is None else noise
        abar = self.model.alphas_cumprod if use_original_steps else self.ddim_alphas
        t = torch.as_tensor(t, device=x0.device).clamp(max=len(abar) - 1).reshape(-1)
        abar = abar[t].view(-1, *([1] * (x0.ndim - 1)))
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * noise
