"""How training noise is drawn: one callable `(x_start, random) -> noise`, chosen by `noise_config` in the yaml."""

from __future__ import annotations

import torch

from ldm.modules.randomness import Randomness


class GaussianNoise:
    """Independent standard normal noise, the default.

    Args:
        offset_strength: adds one normal number a sample and channel times this to the whole channel, which lets a
            model learn very dark and very bright pictures (0 = off).
    """

    def __init__(self, offset_strength: float = 0.0) -> None:
        self.offset_strength = offset_strength

    def __call__(self, x_start: torch.Tensor, random: Randomness) -> torch.Tensor:
        """Noise of the shape [B, C, H, W] of `x_start`."""
        noise = random.randn_like(x_start)
        if self.offset_strength:
            noise = noise + self.offset_strength * random.randn_like(x_start[..., :1, :1])
        return noise
