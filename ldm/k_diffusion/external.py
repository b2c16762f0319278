"""Trained networks of other kinds as denoisers D(x, sigma) of x = x_0 + sigma * noise, under k-diffusion's names.

A variance-preserving model sees x / sqrt(1 + sigma^2) at the timestep of that noise; alpha-bar is 1 / (1 + sigma^2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ldm.k_diffusion.denoiser import each
from ldm.k_diffusion.schedules import append_zero


def sigmas_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The levels of noise of alpha-bars: sqrt((1 - abar) / abar)."""
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


class NoisePredictor(nn.Module, ABC):
    """D(x, sigma) = x - sigma eps, for what predicts the noise."""

    sigma_data = 1.0

    @abstractmethod
    def get_eps(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The network's noise in x at t [B]."""

    @abstractmethod
    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        """What the network is told of sigma."""

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_out and c_in, for `sigma` of any shape."""
        return -sigma, (sigma**2 + self.sigma_data**2).rsqrt()

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input [B, ...], for sigma [B] above 0."""
        c_out, c_in = self.get_scalings(each(sigma, input))
        return input + c_out * self.get_eps(input * c_in, self.sigma_to_t(sigma), **kwargs)

    def loss(self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B], the mean squared error of the predicted noise."""
        level = each(sigma, input)
        eps = self.get_eps((input + noise * level) * self.get_scalings(level)[1], self.sigma_to_t(sigma), **kwargs)
        return (eps - noise).square().flatten(1).mean(1)


class VelocityPredictor(nn.Module, ABC):
    """D(x, sigma) = c_skip x + c_out v, for what predicts v (Salimans & Ho, 2022)."""

    sigma_data = 1.0

    @abstractmethod
    def get_v(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The network's v for x at t [B]."""

    @abstractmethod
    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        """What the network is told of sigma."""

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c_skip, c_out and c_in, for `sigma` of any shape."""
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return (self.sigma_data * c_in) ** 2, -sigma * self.sigma_data * c_in, c_in

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input [B, ...], for sigma [B] above 0."""
        c_skip, c_out, c_in = self.get_scalings(each(sigma, input))
        return input * c_skip + c_out * self.get_v(input * c_in, self.sigma_to_t(sigma), **kwargs)

    def loss(self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B], the mean squared error of the predicted v."""
        level = each(sigma, input)
        c_skip, c_out, c_in = self.get_scalings(level)
        noised = input + noise * level
        v = self.get_v(noised * c_in, self.sigma_to_t(sigma), **kwargs)
        return (v - (input - c_skip * noised) / c_out).square().flatten(1).mean(1)


class VDenoiser(VelocityPredictor):
    """v-diffusion's models: alpha = cos(pi t / 2), and sigma = tan(pi t / 2), for times t in [0, 1)."""

    def __init__(self, inner_model: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model

    def get_v(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.inner_model(x, t, **kwargs)

    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.atan() / (math.pi / 2)

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The level of noise at times t."""
        return (t * (math.pi / 2)).tan()


class DiscreteSchedule(nn.Module):
    """Between N trained levels of noise, log sigma is interpolated linearly in the timestep.

    Args:
        sigmas: [N], rising; timestep t has sigmas[t].
        quantize: tell the network the nearest trained timestep, in place of a fraction between two.
    """

    def __init__(self, sigmas: torch.Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> torch.Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> torch.Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> torch.Tensor:
        """[n + 1] levels at timesteps evenly apart, and 0; None for all of the trained ones."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        t = torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)
        return append_zero(self.t_to_sigma(t))

    def sigma_to_t(self, sigma: torch.Tensor, quantize: bool | None = None) -> torch.Tensor:
        """Timesteps of levels, of any shape: fractions, or the nearest whole ones; what lies beyond gets the ends."""
        log_sigma = sigma.to(self.log_sigmas.dtype).log().contiguous()
        right = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[right - 1], self.log_sigmas[right]
        w = ((log_sigma - low) / (high - low)).clamp(0, 1)
        if self.quantize if quantize is None else quantize:
            return right - 1 + (w > 0.5).long()
        return right - 1 + w

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Levels of timesteps, of any shape, fractions among them."""
        low = t.floor().long().clamp(0, len(self.log_sigmas) - 2)
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[low + 1], (t - low).to(self.log_sigmas)).exp()


class DiscreteEpsDDPMDenoiser(DiscreteSchedule, NoisePredictor):
    """Models of N timesteps that predict the noise, called as `model(x, t, **extra_args)`."""

    def __init__(self, model: Any, alphas_cumprod: torch.Tensor, quantize: bool) -> None:
        super().__init__(sigmas_of(alphas_cumprod), quantize)
        self.inner_model = model

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model(*args, **kwargs)


class DiscreteVDDPMDenoiser(DiscreteSchedule, VelocityPredictor):
    """Models of N timesteps that predict v, called as `model(x, t, **extra_args)`."""

    def __init__(self, model: Any, alphas_cumprod: torch.Tensor, quantize: bool) -> None:
        super().__init__(sigmas_of(alphas_cumprod), quantize)
        self.inner_model = model

    def get_v(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model(*args, **kwargs)


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """OpenAI's guided diffusion.

    Args:
        diffusion: its `GaussianDiffusion`, of which the `alphas_cumprod` are used.
        has_learned_sigmas: the model's output has a variance behind the noise, which is left out.
    """

    def __init__(
        self,
        model: Any,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        alphas_cumprod = torch.as_tensor(diffusion.alphas_cumprod, dtype=torch.float32, device=device)
        super().__init__(model, alphas_cumprod, quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.inner_model(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """Latent diffusion models that predict the noise (Stable Diffusion v1); `cond` is the condition."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model.apply_model(*args, **kwargs)


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """Latent diffusion models that predict v (Stable Diffusion 2.1 at 768 pixels); `cond` is the condition."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_v(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model.apply_model(*args, **kwargs)
