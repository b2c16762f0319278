"""DPM-Solver++ 2M: second-order multistep data prediction, uniform in time (Lu et al., 2022, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ldm.errors import UserError
from ldm.models.diffusion.sampling import Denoiser, Generators, Sampler, Watch, steps_bar

FEW_STEPS = 15


class DPMSolverSampler(Sampler):
    """Deterministic; with fewer than 15 steps the last is of first order, which is steadier."""

    name = "DPM-Solver++"

    def make_schedule(self, steps: int) -> None:
        """`steps` + 1 times uniform in [1 / N, 1] and, at each, alpha, sigma and lambda = log(alpha / sigma).

        Between the N trained timesteps log alpha is interpolated linearly (appendix D.4 of Lu et al., 2022a).
        """
        total = self.ddpm_num_timesteps
        if not 1 <= steps <= total:
            raise UserError(f"sampling steps: {steps} is not within 1 .. {total}, the model's timesteps")
        times = np.linspace(1.0, 1.0 / total, steps + 1)
        trained = np.arange(1, total + 1) / total
        log_alpha = 0.5 * np.log(self.model.alphas_cumprod.double().cpu().numpy())
        log_alpha = np.interp(times, trained, log_alpha)
        sigma = np.sqrt(1.0 - np.exp(2.0 * log_alpha))
        self.lambdas = log_alpha - np.log(sigma)

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.model.betas.device)

        self.timesteps = on_device((times - 1.0 / total) * total)
        self.alphas, self.sigmas = on_device(np.exp(log_alpha)), on_device(sigma)

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
        """Samples [batch_size, *shape] in S steps, and intermediates; arguments as `DDIMSampler.sample`."""
        if eta:
            raise UserError(f"DPM-Solver draws no noise in its steps: ddim_eta must be 0, not {eta}; use DDIM")
        self.generator = generator
        self.make_schedule(S)
        denoiser = Denoiser(self.model, conditioning, unconditional_guidance_scale, unconditional_conditioning)
        x = self.begin(batch_size, shape, x_T)
        watch = Watch(x, S, log_every_t, callback, img_callback)
        return self.run(x, denoiser, S, watch, mask, x0, show_progress)

    def run(
        self,
        x: torch.Tensor,
        denoiser: Denoiser,
        start: int,
        watch: Watch,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        show_progress: bool = True,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The last `start` steps of the schedule, from x."""
        steps = len(self.timesteps) - 1
        first, before = steps - start, None
        for i, n in enumerate(steps_bar(range(first, steps), start, show_progress, self.name)):
            t = self.timesteps[n].expand(len(x))
            x = self.keep_known(x, t.round().long(), mask, x0)
            now = denoiser.x0(x, t, self.alphas[n], self.sigmas[n])
            first_order = n == steps - 1 and steps < FEW_STEPS
            x = self.step(x, n, now, None if first_order else before)
            before = now
            watch(i, x, now)
        return x, watch.intermediates

    def step(self, x: torch.Tensor, n: int, now: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """x at time n + 1 from x and its x_0 prediction at time n, and the prediction before (eq. 9 and 12)."""
        h = self.lambdas[n + 1] - self.lambdas[n]
        x0 = now
        if before is not None:
            r = (self.lambdas[n] - self.lambdas[n - 1]) / h
            x0 = now + (now - before) / (2.0 * r)
        return self.sigmas[n + 1] / self.sigmas[n] * x - self.alphas[n + 1] * float(np.expm1(-h)) * x0

    @torch.no_grad()
    def stochastic_encode(
        self, x0: torch.Tensor, t: torch.Tensor | int, noise: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x0 noised so that `t` steps of the schedule are left; t = S starts from the highest noise."""
        n = len(self.timesteps) - 1 - int(torch.as_tensor(t).reshape(-1)[0])
        noise = self.normal(x0) if noise is None else noise
        return self.alphas[n] * x0 + self.sigmas[n] * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: torch.Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        generator: Generators = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The last `t_start` steps from a noised x_latent, as after `stochastic_encode`."""
        if generator is not None:
            self.generator = generator
        denoiser = Denoiser(self.model, cond, unconditional_guidance_scale, unconditional_conditioning)
        watch = Watch(x_latent, int(t_start), callback=callback, img_callback=img_callback)
        return self.run(x_latent, denoiser, int(t_start), watch, mask, x0, show_progress)[0]
