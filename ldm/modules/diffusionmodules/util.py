"""What the networks share: noise schedules, timestep embeddings, norms, activation checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from ldm.errors import UserError


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """The noise variances of a discrete diffusion process: [n_timestep] float64 in (0, 1).

    `linear` is linear in the square root of beta (the schedule of Stable Diffusion), `sqrt_linear` is linear
    in beta (Ho et al., 2020), `sqrt` is the square root of that, `cosine` is Nichol & Dhariwal, 2021, eq. 17.

    Raises:
        UserError: there is no such schedule.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        u = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s
        abar = np.cos(u / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - abar[1:] / abar[:-1], 0.0, 0.999)
    raise UserError(f"beta_schedule: '{schedule}' is unknown; use linear, sqrt_linear, sqrt or cosine")


def extract_into_tensor(values: Tensor, t: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """`values[t]` shaped to broadcast over a batch of `shape`: [T], [B] -> [B, 1, ..., 1]."""
    return values.gather(-1, t).reshape(t.shape[0], *((1,) * (len(shape) - 1)))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first (Vaswani et al., 2017): [B], fractions allowed, -> [B, dim]."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """`module` with every parameter set to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Group norm whose statistics are accumulated in float32 and whose output has its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    """The group norm of the U-Net: 32 groups.

    Raises:
        UserError: 32 does not divide `channels`.
    """
    if channels % 32:
        raise UserError(
            f"unet_config: a layer of {channels} channels cannot be normalised in 32 groups; "
            "make model_channels times every entry of channel_mult a multiple of 32"
        )
    return GroupNorm32(32, channels, eps=eps)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution in 1, 2 or 3 dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling in 1, 2 or 3 dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def checkpoint(function: Callable[..., Tensor], *inputs: Any, enabled: bool) -> Tensor:
    """`function(*inputs)`; when `enabled`, the backward pass recomputes its activations.

    The non-reentrant kind: the other gives a block's own parameters no gradient when none of its inputs needs
    one, which is the case for the first adapter above a frozen base.
    """
    if not enabled or not torch.is_grad_enabled():
        return function(*inputs)
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
