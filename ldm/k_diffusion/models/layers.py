"""What the image U-Net of k-diffusion is made of; state-dict keys are upstream's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ldm.k_diffusion.denoiser import each

Layer = TypeVar("Layer", bound=nn.Module)
FILTER = (1 / 8, 3 / 8, 3 / 8, 1 / 8)  # of down- and upsampling, along a side


@dataclass(frozen=True)
class Condition:
    """What leads the network, beside its input.

    Attributes:
        mapped: [B, F], the mapping network's output: noise level, augmentation and what else was mapped.
        cross: [B, T, D], tokens for cross-attention. padding: [B, T], true where they are padding.
    """

    mapped: torch.Tensor
    cross: torch.Tensor | None = None
    padding: torch.Tensor | None = None


class Conditioned(nn.Module):
    """A layer that is called as `layer(x, condition)`."""


class ConditionedSequential(nn.Sequential, Conditioned):
    """Layers one after the other; those that are `Conditioned` get the condition."""

    def forward(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        for layer in self:
            x = layer(x, condition) if isinstance(layer, Conditioned) else layer(x)
        return x


def zero(layer: Layer) -> Layer:
    """`layer` with weights and bias of zero: a residual branch that ends in it begins as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def orthogonal(layer: Layer) -> Layer:
    """`layer` with an orthogonal weight matrix."""
    nn.init.orthogonal_(layer.weight)
    return layer


class AdaGN(Conditioned):
    """Group normalisation whose scale and shift the condition says; without it they are 1 and 0."""

    def __init__(self, mapped_features: int, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.mapper = zero(nn.Linear(mapped_features, 2 * channels))

    def forward(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        scale, shift = self.mapper(condition.mapped).chunk(2, dim=-1)
        return torch.addcmul(each(shift, x), F.group_norm(x, self.groups, eps=1e-5), each(scale, x) + 1)


class ResConvBlock(Conditioned):
    """Two 3x3 convolutions beside a skip connection, each after AdaGN and GELU."""

    def __init__(
        self, mapped_features: int, c_in: int, c_mid: int, c_out: int, group_size: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.main = ConditionedSequential(
            AdaGN(mapped_features, c_in, max(1, c_in // group_size)),
            nn.GELU(),
            nn.Conv2d(c_in, c_mid, 3, padding=1),
            nn.Dropout2d(dropout),
            AdaGN(mapped_features, c_mid, max(1, c_mid // group_size)),
            nn.GELU(),
            zero(nn.Conv2d(c_mid, c_out, 3, padding=1)),
            nn.Dropout2d(dropout),
        )
        self.skip = nn.Identity() if c_in == c_out else orthogonal(nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.main(x, condition) + self.skip(x)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: nn.Dropout, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of q [B, heads, h * w, D] to k and v [B, heads, T, D], as [B, heads * D, h * w]."""
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout.p if dropout.training else 0.0)
    return out.transpose(2, 3).flatten(1, 2)


class SelfAttention2d(Conditioned):
    """Self-attention of an image's pixels, beside a skip connection."""

    def __init__(self, channels: int, heads: int, norm: AdaGN, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in = norm
        self.qkv_proj = nn.Conv2d(channels, 3 * channels, 1)
        self.out_proj = zero(nn.Conv2d(channels, channels, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        qkv = self.qkv_proj(self.norm_in(x, condition)).flatten(2)
        q, k, v = qkv.unflatten(1, (3 * self.heads, -1)).transpose(2, 3).chunk(3, dim=1)
        return x + self.out_proj(attend(q, k, v, self.dropout).view_as(x))


class CrossAttention2d(Conditioned):
    """Attention of an image's pixels to the condition's tokens, beside a skip connection."""

    def __init__(self, channels: int, token_features: int, heads: int, norm: AdaGN, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_enc = nn.LayerNorm(token_features)
        self.norm_dec = norm
        self.q_proj = nn.Conv2d(channels, channels, 1)
        self.kv_proj = nn.Linear(token_features, 2 * channels)
        self.out_proj = zero(nn.Conv2d(channels, channels, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        q = self.q_proj(self.norm_dec(x, condition)).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
        tokens = self.kv_proj(self.norm_enc(condition.cross))
        k, v = tokens.unflatten(2, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        mask = None if condition.padding is None else ~condition.padding.bool()[:, None, None, :]
        return x + self.out_proj(attend(q, k, v, self.dropout, mask).view_as(x))


class Resample2d(nn.Module):
    """Each channel filtered by `FILTER` along both sides; `kernel` is stored, as upstream does."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        taps = torch.tensor([FILTER]) * gain
        self.register_buffer("kernel", taps.T @ taps)

    def weight(self, x: torch.Tensor) -> torch.Tensor:
        """The filter of each of x's channels [C, 1, 4, 4]."""
        return self.kernel.to(x).expand(x.shape[1], 1, -1, -1)


class Downsample2d(Resample2d):
    """Images [B, C, H, W] at half their size; sides are even."""

    def __init__(self) -> None:
        super().__init__(gain=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.weight(x), stride=2, groups=x.shape[1])


class Upsample2d(Resample2d):
    """Images [B, C, H, W] at twice their size."""

    def __init__(self) -> None:
        super().__init__(gain=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        return F.conv_transpose2d(x, self.weight(x), stride=2, padding=3, groups=x.shape[1])


class FourierFeatures(nn.Module):
    """[B, n] numbers as [B, features]: cosines and sines of their products with fixed random frequencies."""

    def __init__(self, c_in: int, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(features // 2, c_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * x @ self.weight.T
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet(nn.Module):
    """Levels from the outermost one down and up again, each way up beside what the way down left behind.

    Args:
        d_blocks: the ways down, outermost first. u_blocks: the ways up, innermost first.
        skip_stages: outermost levels that are left out.
    """

    def __init__(self, d_blocks: list[nn.Module], u_blocks: list[nn.Module], skip_stages: int = 0) -> None:
        super().__init__()
        self.d_blocks, self.u_blocks = nn.ModuleList(d_blocks), nn.ModuleList(u_blocks)
        self.skip_stages = skip_stages

    def used(self) -> list[nn.Module]:
        """The blocks of the levels that are not left out, in the order of computation."""
        levels = len(self.d_blocks) - self.skip_stages
        return [*self.d_blocks[self.skip_stages :], *self.u_blocks[:levels]]

    def forward(self, x: torch.Tensor, condition: Condition, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        """x [B, C, H, W] through all levels; `run(block, x, condition)` calls one."""
        blocks, levels, left = self.used(), len(self.d_blocks) - self.skip_stages, []
        for block in blocks[:levels]:
            x = run(block, x, condition)
            left.append(x)
        left.pop()  # the innermost level's own
        for i, block in enumerate(blocks[levels:]):
            x = run(block, torch.cat([x, left.pop()], dim=1) if i else x, condition)
        return x
