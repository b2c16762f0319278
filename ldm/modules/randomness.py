"""Random numbers of training as a function of (seed, step, global sample index).

A sample then sees the same noise, timestep and dropout whatever the batch size, the number of processes or a
restart in between.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch


def sample_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every one of `parts` and nothing else."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleRandom:
    """One generator a sample of a batch; every draw gives sample i numbers of its own generator.

    Args:
        seed: the run's seed. step: the number of batches trained so far.
        first_index: index of the batch's first sample in the global batch of all processes.
        stride: from one sample's index to the next one's; the number of processes, which take samples in turn.
    """

    def __init__(
        self, seed: int, step: int, first_index: int, batch_size: int, device: torch.device | str, stride: int = 1
    ) -> None:
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(self.device).manual_seed(sample_seed(seed, step, first_index + stride * i))
            for i in range(batch_size)
        ]

    def part(self, samples: slice) -> SampleRandom:
        """The random numbers of some samples of the batch, with the same generators."""
        part = copy.copy(self)
        part.generators = self.generators[samples]
        return part

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of the shape [B, ...], type and device of `x`."""
        out = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        for row, generator in zip(out, self.generators, strict=True):
            row.normal_(generator=generator)
        return out.to(x.device)

    def rand(self) -> torch.Tensor:
        """[B] numbers uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g, device=self.device) for g in self.generators])

    def randint(self, high: int) -> torch.Tensor:
        """[B] integers uniform in 0 .. high - 1."""
        return torch.cat([torch.randint(high, (1,), generator=g, device=self.device) for g in self.generators])


class GlobalRandom:
    """The same draws from torch's global generator, for calls outside a training step."""

    def __init__(self, batch_size: int, device: torch.device | str) -> None:
        self.batch_size, self.device = batch_size, device

    def part(self, samples: slice) -> GlobalRandom:
        return GlobalRandom(len(range(self.batch_size)[samples]), self.device)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(x)

    def rand(self) -> torch.Tensor:
        return torch.rand(self.batch_size, device=self.device)

    def randint(self, high: int) -> torch.Tensor:
        return torch.randint(high, (self.batch_size,), device=self.device)


Randomness = SampleRandom | GlobalRandom


def drop_captions(values: Sequence[str], random: Randomness, probability: float, replacement: str = "") -> list[str]:
    """`values` with each replaced by `replacement` with the given probability (for classifier-free guidance)."""
    drop = random.rand() < probability
    return [replacement if dropped else value for value, dropped in zip(values, drop.tolist(), strict=True)]
