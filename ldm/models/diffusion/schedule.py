"""The discrete noise schedule of DDPM (Ho et al., 2020) and the identities between x_0, noise, x_t and v."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.util import UserError

PARAMETERIZATIONS = ("eps", "x0", "v")


class NoiseSchedule(nn.Module):
    """A mixin that registers the schedule's buffers under CompVis' names and computes with them.

    All tensors `x`, `noise`, `v` are [B, ...]; `t` is [B], integers in 0 .. num_timesteps - 1.
    """

    num_timesteps: int
    parameterization: str
    v_posterior: float

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute every coefficient once, in float64, and keep it in float32."""
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = np.asarray(
                make_beta_schedule(
                    beta_schedule,
                    timesteps,
                    linear_start=linear_start,
                    linear_end=linear_end,
                    cosine_s=cosine_s,
                ),
                dtype=np.float64,
            )
        alphas = 1.0 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        self.num_timesteps = len(betas)
        self.linear_start, self.linear_end = linear_start, linear_end
        variance = (1 - self.v_posterior) * betas * (1.0 - abar_prev) / (1.0 - abar) + self.v_posterior * betas
        buffers = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
        }
        for name, value in buffers.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        weights = self._elbo_weights(betas, alphas, abar, variance)
        self.register_buffer("lvlb_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def _elbo_weights(
        self, betas: np.ndarray, alphas: np.ndarray, abar: np.ndarray, variance: np.ndarray
    ) -> np.ndarray:
        """Weight of each timestep's squared error in the variational bound (Ho et al., 2020, eq. 12)."""
        if self.parameterization == "eps":
            with np.errstate(divide="ignore"):
                weights = betas**2 / (2 * variance * alphas * (1 - abar))
        elif self.parameterization == "x0":
            weights = 0.5 * np.sqrt(abar) / (2.0 - abar)
        elif self.parameterization == "v":
            weights = np.ones_like(betas)
        else:
            raise UserError(
                f"yaml: parameterization: '{self.parameterization}' is none of {', '.join(PARAMETERIZATIONS)}"
            )
        if len(weights) > 1:
            weights[0] = weights[1]
        return weights

    def min_snr_weights(self, gamma: float) -> torch.Tensor:
        """Weight [num_timesteps] of each timestep's squared error: min(SNR, gamma) for x_0's (Hang et al., 2023).

        SNR = abar / (1 - abar). The error of x_0 is that of the noise times 1 / SNR, and that of v times 1 / (SNR + 1):
        so the weight is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v.
        """
        abar = self.alphas_cumprod.double()
        snr = abar / (1 - abar)
        if self.parameterization == "eps":
            return (gamma / snr).clamp(max=1).float()
        return (snr.clamp(max=gamma) / (1 if self.parameterization == "x0" else snr + 1)).float()

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

    def get_v(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho, 2022)."""
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x.shape) * noise
            - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x.shape) * x
        )

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_0 from x_t and the noise in it."""
        return (
            extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
            - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise
        )

    def predict_start_from_z_and_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x_0 from x_t and v."""
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape) * x_t
            - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * v
        )

    def predict_eps_from_z_and_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The noise in x_t from v."""
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape) * v
            + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * x_t
        )

    def predict_start(self, x_t: torch.Tensor, t: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x_0 from the network's raw output, whatever it is trained to predict."""
        if self.parameterization == "x0":
            return output
        if self.parameterization == "v":
            return self.predict_start_from_z_and_v(x_t, t, output)
        return self.predict_start_from_noise(x_t, t, output)

    def training_target(self, x_start: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network is trained to predict: the noise, x_0 or v."""
        if self.parameterization == "x0":
            return x_start
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (Ho et al., 2020, eq. 6-7)."""
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, x_t.shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)
