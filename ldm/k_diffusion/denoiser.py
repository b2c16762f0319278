"""The preconditioned denoiser of Karras et al. (2022, EDM) and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldm.errors import UserError

# A noise level's weight in the loss, relative to EDM's, whose loss the network's own output has in equation 8;
# s and d are sigma and sigma_data. `snr` makes it the plain loss of predicted noise, `soft-min-snr` a smooth min-SNR.
WEIGHTINGS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "karras": lambda s, d: torch.ones_like(s),
    "snr": lambda s, d: d**2 / (s**2 + d**2),
    "sqrt-snr": lambda s, d: s * d / (s**2 + d**2),
    "soft-min-snr": lambda s, d: (s * d) ** 2 / (s**2 + d**2) ** 2,
}


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; sigma) (Karras et al., 2022, equation 7).

    The network F gets sigma itself and makes c_noise = log(sigma) / 4 of it.

    Args:
        inner_model: F, called as `inner_model(x, sigma, **conditions)`.
        sigma_data: standard deviation of the images' values.
        weighting: what noise levels count in the loss: karras, snr, sqrt-snr or soft-min-snr.

    Raises:
        UserError: there is no such weighting, or sigma_data is no number above 0.
    """

    def __init__(self, inner_model: nn.Module, sigma_data: float = 1.0, weighting: str = "karras") -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise UserError(f"yaml: weighting is {weighting!r}; it must be one of {', '.join(WEIGHTINGS)}")
        if isinstance(sigma_data, bool) or not isinstance(sigma_data, int | float) or not 0 < sigma_data < float("inf"):
            raise UserError(f"yaml: sigma_data is {sigma_data!r}; it must be a number above 0")
        self.inner_model = inner_model
        self.sigma_data = float(sigma_data)
        self.weighting = weighting

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c_skip, c_out, c_in for `sigma` of any shape (table 1, last column)."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """The denoised images [B, C, H, W] of x = images + sigma * noise, for sigma [B] above 0."""
        c_skip, c_out, c_in = self.get_scalings(each(sigma, x))
        return c_skip * x + c_out * self.inner_model(c_in * x, sigma, **conditions)

    def loss(
        self,
        x_start: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        seen_noise: torch.Tensor | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """Each sample's loss [B] (equation 8), for clean images x_start [B, C, H, W], `noise` and sigma [B].

        Args:
            seen_noise: what the network's input is made with, where that is not `noise`.
        """
        c_skip, c_out, c_in = self.get_scalings(each(sigma, x_start))
        target = (x_start - c_skip * (x_start + each(sigma, noise) * noise)) / c_out
        seen = x_start + each(sigma, noise) * (noise if seen_noise is None else seen_noise)
        return self.compare(c_in * seen, target, sigma, conditions)

    def compare(
        self, x: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """The weighted mean squared error [B] of F's output for the scaled input x."""
        errors = (self.inner_model(x, sigma, **conditions).float() - target) ** 2
        return errors.flatten(1).mean(1) * WEIGHTINGS[self.weighting](sigma, self.sigma_data)


class DenoiserWithVariance(Denoiser):
    """A denoiser whose network also says how far off it may be: an isotropic Gaussian around its output.

    The loss is that Gaussian's negative log density a pixel, up to a constant; it weighs noise levels by itself, so
    there is nothing to choose.
    """

    def compare(
        self, x: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        output, logvar = self.inner_model(x, sigma, return_variance=True, **conditions)
        errors = (output.float() - target) ** 2
        logvar = each(logvar.float(), errors)
        return ((errors / logvar.exp() + logvar) / 2).flatten(1).mean(1)


def each(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values` [B] as [B, 1, ...], to be multiplied with samples `like` [B, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
