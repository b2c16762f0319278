"""The autoencoder's posterior: a Gaussian with its own mean and variance at every place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class DiagonalGaussianDistribution:
    """Gaussian over latents from `parameters` [B, 2C, h, w]: mean, then log variance clamped to [-30, 20]."""

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """One draw [B, C, h, w]."""
        noise = torch.randn(
            self.mean.shape, generator=generator, dtype=self.mean.dtype,
            device=generator.device if generator else self.mean.device,
        )  # fmt: skip
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> torch.Tensor:
        """The mean [B, C, h, w]."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        """KL divergence [B] in nats from the standard normal, or from `other`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            squares = (self.mean - other.mean) ** 2 + self.var
            terms = squares / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: torch.Tensor, dims: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
        """Negative log likelihood in nats of `sample`, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=list(dims))
