"""What all samplers do around their arithmetic: levels of noise, the network's calls, callbacks, the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ldm.k_diffusion.denoiser import each

Model = Callable[..., torch.Tensor]  # model(x, sigma[B], **extra_args) -> denoised
Callback = Callable[[dict[str, Any]], None]


def to_d(x: torch.Tensor, sigma: float | torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
    """dx/dsigma of the probability flow ODE (Karras et al., 2022, eq. 1 and 3 with sigma(t) = t)."""
    return (x - denoised) / (each(sigma, x) if isinstance(sigma, torch.Tensor) else sigma)


def get_ancestral_step(sigma_from: float, sigma_to: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up): step down to the first, then add noise of the second, to arrive at sigma_to.

    With eta 1 that is as much noise as the trained process has (Ho et al., 2020, eq. 7), with 0 there is none.
    """
    if not eta:
        return sigma_to, 0.0
    sigma_up = min(sigma_to, eta * sigma_to * (1 - (sigma_to / sigma_from) ** 2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


@dataclass
class Steps:
    """A sampler's way down the levels of noise.

    These are read to the host once, so that coefficients are plain numbers and no step has to wait for the device.

    Raises:
        ValueError: a level is repeated, which would be a step to nowhere.
    """

    model: Model
    x: torch.Tensor
    sigmas: torch.Tensor
    extra_args: Mapping[str, Any] | None = None
    callback: Callback | None = None
    disable: bool | None = None

    def __post_init__(self) -> None:
        self.levels: list[float] = self.sigmas.tolist()
        for i, (level, following) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
            if level == following:
                raise ValueError(f"sigmas: {level:g} is repeated at place {i + 1}; the step between would do nothing")

    def __len__(self) -> int:
        return len(self.levels) - 1

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        """i, sigma and sigma_next of every step, under a progress bar."""
        for i in tqdm(range(len(self)), disable=self.disable):
            yield i, self.levels[i], self.levels[i + 1]

    @property
    def range(self) -> tuple[float, float]:
        """The lowest level above 0, and the highest."""
        return min(level for level in self.levels if level > 0), max(self.levels)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The model's D(x, sigma)."""
        return self.model(x, x.new_full([len(x)], sigma), **(self.extra_args or {}))

    def tell(self, i: int, x: torch.Tensor, denoised: torch.Tensor, sigma_hat: float | None = None) -> None:
        """Call the callback, with tensors."""
        if self.callback is not None:
            sigma = self.sigmas[i]
            hat = sigma if sigma_hat is None else torch.full_like(sigma, sigma_hat)
            self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": hat, "denoised": denoised})
