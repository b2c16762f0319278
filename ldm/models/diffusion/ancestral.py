"""The trained process itself, step by step through every timestep (Ho et al., 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ldm.errors import UserError
from ldm.models.diffusion.sampling import Denoiser, Generators, Sampler, Watch, steps_bar


class AncestralSampler(Sampler):
    """Samples a model that has `apply_model`, `betas`, `alphas_cumprod` and `parameterization`.

    The variance is the posterior's (`fixed small`); with the model's `clip_denoised` every x_0 is kept in [-1, 1].
    """

    name = "DDPM"

    def make_schedule(self) -> None:
        """Compute every timestep's coefficients once (Ho et al., 2020, eq. 7)."""
        betas, abar = self.model.betas.double(), self.model.alphas_cumprod.double()
        previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        self.alphas, self.sigmas = abar.sqrt().float(), (1 - abar).sqrt().float()
        self.of_x0 = (betas * previous.sqrt() / (1 - abar)).float()
        self.of_x = ((1 - betas).sqrt() * (1 - previous) / (1 - abar)).float()
        self.noise_scales = (betas * (1 - previous) / (1 - abar)).sqrt().float()

    @torch.no_grad()
    def sample(
        self,
        S: int | None,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        x_T: torch.Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        generator: Generators = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Samples [batch_size, *shape], and intermediates {x_inter, pred_x0}.

        Args:
            S: the model's number of timesteps, or None for it: the process has no other.
            x_T: the starting noise. generator: one for all, or a list with one a picture.

        Raises:
            UserError: S is another number.
        """
        if S not in (None, self.ddpm_num_timesteps):
            raise UserError(f"sampling steps: {S}: the trained process has {self.ddpm_num_timesteps} and no fewer")
        self.generator, self.total = generator, self.ddpm_num_timesteps
        self.make_schedule()
        denoiser = Denoiser(self.model, conditioning, unconditional_guidance_scale, unconditional_conditioning)
        x = self.begin(batch_size, shape, x_T)
        watch = Watch(x, self.total, log_every_t, callback, img_callback)
        for i, index in enumerate(steps_bar(reversed(range(self.total)), self.total, show_progress, self.name)):
            t = torch.full((len(x),), index, device=x.device)
            x0 = denoiser.x0(x, t, self.alphas[index], self.sigmas[index])
            x0 = x0.clamp(-1.0, 1.0) if getattr(self.model, "clip_denoised", False) else x0
            x = self.of_x0[index] * x0 + self.of_x[index] * x
            if index:
                x = x + self.noise_scales[index] * self.normal(x)
            watch(i, x, x0)
        return x, watch.intermediates
