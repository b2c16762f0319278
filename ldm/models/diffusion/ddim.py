"""DDIM (Song et al., 2021): fewer steps of the trained process, deterministic at eta 0, ancestral at eta 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ldm.models.diffusion.sampling import Denoiser, Generators, Sampler, Watch, ddim_timesteps, steps_bar


class DDIMSampler(Sampler):
    """Samples a model that has `apply_model`, `alphas_cumprod` and `parameterization`."""

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
        self.ddim_eta = ddim_eta

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.model.betas.device)

        self.ddim_alphas, self.ddim_alphas_prev = on_device(alphas), on_device(previous)
        self.ddim_sigmas = on_device(sigmas)
        self.ddim_sqrt_alphas = on_device(np.sqrt(alphas))
        self.ddim_sqrt_one_minus_alphas = on_device(np.sqrt(1.0 - alphas))
        self.ddim_direction = on_device(np.sqrt(1.0 - previous - sigmas**2))

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        verbose: bool = True,
        x_T: torch.Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        generator: Generators = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Samples [batch_size, *shape] in S steps, and intermediates {x_inter, pred_x0}.

        Args:
            eta: 0 deterministic, 1 as much fresh noise as the trained process.
            mask, x0: where mask is 1, x0's content is kept.
            x_T: the starting noise. generator: one for all, or a list with one a picture.
        """
        self.generator = generator
        self.make_schedule(S, ddim_eta=eta)
        denoiser = Denoiser(self.model, conditioning, unconditional_guidance_scale, unconditional_conditioning)
        x = self.begin(batch_size, shape, x_T)
        watch = Watch(x, len(self.ddim_timesteps), log_every_t, callback, img_callback)
        return self.run(x, denoiser, len(self.ddim_timesteps), watch, mask, x0, temperature, show_progress)

    def run(
        self,
        x: torch.Tensor,
        denoiser: Denoiser,
        start: int,
        watch: Watch,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        temperature: float = 1.0,
        show_progress: bool = True,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The last `start` steps of the schedule, from x."""
        times = torch.as_tensor(self.ddim_timesteps, device=x.device)
        self.total = start
        for i, index in enumerate(steps_bar(reversed(range(start)), start, show_progress, self.name)):
            t = times[index].expand(len(x))
            x = self.keep_known(x, t, mask, x0)
            alpha, sigma = self.ddim_sqrt_alphas[index], self.ddim_sqrt_one_minus_alphas[index]
            eps = denoiser.eps(x, t, alpha, sigma)
            x, pred_x0 = self.step(x, eps, index, temperature)
            watch(i, x, pred_x0)
        return x, watch.intermediates

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

    @torch.no_grad()
    def decode(
        self,
        x_latent: torch.Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        generator: Generators = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        show_progress: bool = True,
    ) -> torch.Tensor:
        """The last `t_start` steps from a noised x_latent, as after `stochastic_encode`."""
        if use_original_steps:
            self.make_schedule(self.ddpm_num_timesteps, ddim_eta=self.ddim_eta)
        if generator is not None:
            self.generator = generator
        denoiser = Denoiser(self.model, cond, unconditional_guidance_scale, unconditional_conditioning)
        start = min(int(t_start), len(self.ddim_timesteps))
        watch = Watch(x_latent, start, callback=callback, img_callback=img_callback)
        return self.run(x_latent, denoiser, start, watch, mask, x0, show_progress=show_progress)[0]
