"""The trained process itself, step by step through every timestep (Ho et al., 2020, algorithm 2)."""

from __future__ import annotations

import torch

from ldm.errors import UserError
from ldm.models.diffusion.sampling import Run, Sampler


class AncestralSampler(Sampler):
    """The model also has `betas`, and all of its timesteps are taken.

    The variance is the posterior's (`fixed small`); with the model's `clip_denoised` every x_0 is kept in [-1, 1].
    """

    name = "DDPM"

    def make_schedule(self, steps: int | None = None, *, ddim_eta: float = 0.0) -> None:
        """Compute every timestep's coefficients once (Ho et al., 2020, eq. 7); the process knows no eta.

        Args:
            steps: the model's number of timesteps, or None for it.

        Raises:
            UserError: it is another number.
        """
        if steps not in (None, self.ddpm_num_timesteps):
            raise UserError(f"sampling steps: {steps}: the trained process has {self.ddpm_num_timesteps} and no fewer")
        self.steps = self.ddpm_num_timesteps
        betas, abar = self.model.betas.double(), self.model.alphas_cumprod.double()
        previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        self.alphas, self.sigmas = abar.sqrt().float(), (1 - abar).sqrt().float()
        self.of_x0 = (betas * previous.sqrt() / (1 - abar)).float()
        self.of_x = ((1 - betas).sqrt() * (1 - previous) / (1 - abar)).float()
        self.noise_scales = (betas * (1 - previous) / (1 - abar)).sqrt().float()

    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        for i, index in enumerate(self.bar(reversed(range(run.steps)), run.steps, run)):
            t = torch.full((len(x),), index, device=x.device)
            x = self.keep_known(x, t, run)
            x0 = run.denoiser.x0(x, t, self.alphas[index], self.sigmas[index])
            x0 = x0.clamp(-1.0, 1.0) if getattr(self.model, "clip_denoised", False) else x0
            x = self.of_x0[index] * x0 + self.of_x[index] * x
            if index:
                x = x + self.noise_scales[index] * run.temperature * self.normal(x)
            run.watch(i, x, x0)
        return x, run.watch.intermediates
