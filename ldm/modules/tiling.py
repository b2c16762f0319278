"""Less memory for the same picture: attention in slices (exact), decoding in tiles (nearly exact)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

SLICE = 1024  # queries at a time
TILE = 64  # latents along a side of a tile
OVERLAP = 0.25  # of a tile, shared with its neighbour


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slice_size: int | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of [..., N, d] over [..., M, d], at most `slice_size` queries at a time.

    A query's result depends on no other query, so slices change nothing but the size of the N x M matrix, where
    the device's attention forms one at all.
    """
    if slice_size is None or q.shape[-2] <= slice_size:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(slice_size, dim=-2)], dim=-2)


def slice_attention(model: nn.Module, slice_size: int | None) -> None:
    """Let every attention layer of `model` work on that many queries at a time; None for all."""
    for module in model.modules():
        if hasattr(module, "slice_size"):
            module.slice_size = slice_size


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, tile: int = TILE, overlap: float = OVERLAP
) -> torch.Tensor:
    """`function`, which enlarges [B, C, h, w] to [B, D, f * h, f * w], tile by tile, cross-faded where they overlap.

    The decoder's norms and its attention then see a tile at a time, so colours may differ slightly from the
    whole's; memory is that of one tile and of the result.

    Args:
        tile: places along a side of a tile, at most. overlap: in [0, 1), the share of it that neighbours see too.
    """
    height, width = z.shape[-2:]
    if max(height, width) <= tile:
        return function(z)
    total = weights = None
    shared = int(tile * overlap)
    rows, tall = _spread(height, tile, shared)
    columns, wide = _spread(width, tile, shared)
    for y, x in product(rows, columns):
        part = function(z[..., y : y + tall, x : x + wide]).float()
        f = part.shape[-1] // wide
        if total is None:
            total = part.new_zeros(*part.shape[:2], height * f, width * f)
            weights = part.new_zeros(1, 1, height * f, width * f)
        weight = _ramp(part.shape[-2], shared * f, part)[:, None] * _ramp(part.shape[-1], shared * f, part)
        place = (..., slice(y * f, y * f + part.shape[-2]), slice(x * f, x * f + part.shape[-1]))
        total[place] += part * weight
        weights[place] += weight
    return total / weights


def _spread(size: int, tile: int, shared: int) -> tuple[list[int], int]:
    """(starts, length) of the fewest tiles of one length, at most `tile`, of which neighbours share `shared` places.

    No longer than they must be for that: what many tiles see is computed many times.
    """
    if size <= tile:
        return [0], size
    count = math.ceil((size - shared) / (tile - shared))
    length = math.ceil((size + (count - 1) * shared) / count)
    return [round(i * (size - length) / (count - 1)) for i in range(count)], length


def _ramp(length: int, fade: int, like: torch.Tensor) -> torch.Tensor:
    """[length] weights that rise linearly over the first `fade` places and fall over the last; never 0."""
    place = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(place, length + 1 - place).clamp(max=fade + 1) / (fade + 1)
