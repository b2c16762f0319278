"""PLMS (Liu et al., 2022, arXiv:2202.09778): DDIM's steps with a linear multistep estimate of the noise."""

from __future__ import annotations

import torch

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.sampling import Run

# Adams-Bashforth weights by how many earlier estimates there are, the newest first (Liu et al., 2022, eq. 9).
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """Deterministic: eta must be 0."""

    name = "PLMS"

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        if ddim_eta:
            raise UserError(f"PLMS draws no noise in its steps: ddim_eta must be 0, not {ddim_eta}; use DDIM")
        super().make_schedule(ddim_num_steps, ddim_discretize, 0.0, verbose)

    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The sample that x leads to, and intermediates; the first step makes two calls of the network."""
        times = torch.as_tensor(self.ddim_timesteps, device=x.device)
        earlier: list[torch.Tensor] = []

        def noise_in(value: torch.Tensor, index: int) -> torch.Tensor:
            alpha, sigma = self.ddim_sqrt_alphas[index], self.ddim_sqrt_one_minus_alphas[index]
            return run.denoiser.eps(value, times[index].expand(len(x)), alpha, sigma)

        for i, index in enumerate(self.bar(reversed(range(run.steps)), run.steps, run)):
            x = self.keep_known(x, times[index].expand(len(x)), run)
            eps = noise_in(x, index)
            if earlier:  # eq. 9
                terms = [eps, *earlier]
                estimate = sum(w * e for w, e in zip(WEIGHTS[len(earlier)], terms, strict=True))
            else:  # an improved Euler step to begin with
                guess, _ = self.step(x, eps, index)
                estimate = (eps + noise_in(guess, max(index - 1, 0))) / 2
            x, pred_x0 = self.step(x, estimate, index)
            earlier = [eps, *earlier][:3]
            run.watch(i, x, pred_x0)
        return x, run.watch.intermediates
