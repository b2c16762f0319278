"""Noise of stochastic samplers, each picture's from its own seed: independent, or along a Brownian path.

A noise sampler is called with two levels of noise, `noise_sampler(sigma, sigma_next)`, and gives standard normal
numbers of the shape of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ldm.models.diffusion.sampling import draw_normal

NoiseSampler = Callable[[float, float], torch.Tensor]
Seed = int | torch.Generator
Seeds = Seed | Sequence[Seed] | None  # one for all pictures, or one a picture; None for torch's own generator


def default_noise_sampler(x: torch.Tensor, seed: Seeds = None) -> NoiseSampler:
    """Noise that is drawn anew at every call.

    Args:
        seed: with a list, picture i's noise comes from the seed or generator i alone, whatever the batch.
    """
    device = x.device if x.device.type == "cuda" else "cpu"

    def generator(seed: Seed) -> torch.Generator:
        return seed if isinstance(seed, torch.Generator) else torch.Generator(device).manual_seed(seed)

    alone = seed is None or isinstance(seed, Seed)
    generators = (seed if seed is None else generator(seed)) if alone else [generator(one) for one in seed]
    return lambda sigma, sigma_next: draw_normal(x.shape, generators, x.device).to(x.dtype)


class BatchedBrownianTree:
    """A Brownian motion W of the shape of x, over the times from t0 to t1, that depends on its seed alone.

    Where in between it is asked for, how often and in what order, makes no difference (torchsde's BrownianTree).

    Args:
        seed: an int or generator, or a list of them with one a picture. kwargs: torchsde's, e.g. `tol`.
    """

    def __init__(self, x: torch.Tensor, t0: float, t1: float, seed: Seeds = None, **kwargs: Any) -> None:
        import torchsde

        self.t0, self.t1 = sorted((round(float(t0), 6), round(float(t1), 6)))  # the tree's times have 6 digits
        self.sign = 1.0 if t0 < t1 else -1.0
        self.dtype, self.batched = x.dtype, isinstance(seed, Sequence)
        if self.batched and len(seed) != len(x):
            raise ValueError(f"{len(seed)} seeds for a batch of {len(x)}")
        start = torch.zeros(x.shape[1:] if self.batched else x.shape, device=x.device)
        self.trees = [
            torchsde.BrownianTree(self.t0, start, self.t1, entropy=_entropy(one), **kwargs)
            for one in (seed if self.batched else [seed])
        ]

    def __call__(self, t0: float, t1: float) -> torch.Tensor:
        """W(t1) - W(t0)."""
        low, high = (min(max(float(t), self.t0), self.t1) for t in sorted((t0, t1)))
        sign = self.sign if t0 < t1 else -self.sign
        made = [tree(low, high) for tree in self.trees]
        return sign * (torch.stack(made) if self.batched else made[0]).to(self.dtype)


def _entropy(seed: Seed | None) -> int:
    if isinstance(seed, int):
        return seed
    device = seed.device if seed is not None else "cpu"
    return int(torch.randint(2**63 - 1, (1,), generator=seed, device=device))


class BrownianTreeNoiseSampler:
    """Noise along a Brownian path in sigma: a seed gives the same path however many steps follow it.

    Args:
        sigma_min, sigma_max: the levels within which it will be asked for noise.
        seed: as for `BatchedBrownianTree`.
        transform: from sigma (a tensor) to the time of the Brownian motion.
    """

    def __init__(
        self,
        x: torch.Tensor,
        sigma_min: float | torch.Tensor,
        sigma_max: float | torch.Tensor,
        seed: Seeds = None,
        transform: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        self.tree = BatchedBrownianTree(x, self.time(sigma_min), self.time(sigma_max), seed)

    def time(self, sigma: float | torch.Tensor) -> float:
        """The Brownian motion's time at a level of noise."""
        return float(self.transform(torch.as_tensor(sigma, dtype=torch.float64)))

    def __call__(self, sigma: float | torch.Tensor, sigma_next: float | torch.Tensor) -> torch.Tensor:
        """The path's increment between two levels, scaled to variance 1."""
        t0, t1 = self.time(sigma), self.time(sigma_next)
        return self.tree(t0, t1) / abs(t1 - t0) ** 0.5
