"""Convolution by Winograd's algorithm: 3x3 filters with a quarter of the multiplications.

An output tile of m x m numbers comes from (m + 2)^2 products per pair of channels in place of 9 m^2: 36 for 144 with
m = 4, 16 for 36 with m = 2 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, section 4).
Tiles of image and filter are taken for polynomials, multiplied by their values at m + 1 points and at infinity, and
the product is interpolated. With the points 0, +-3/4, +-3/2 float32 loses about one digit; with 0, +-1 nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from numpy.polynomial import polynomial
from torch import Tensor

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}  # of a tile's length
TILES = 128  # worked on at once: few enough for the cache, enough for matrix products


@cache
def transforms(tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices of a tile's length `tile`, in one dimension, of float64.

    Returns:
        B [n, n], G [n, 3], A [tile, n], with n = tile + 2: A ((G g) * (B d)) are the `tile` values of the correlation
        of n inputs d with a filter g of 3.
    """
    points = POINTS[tile]
    others = [[q for q in points if q != p] for p in points]
    size = len(points)
    powers = np.vander(points, max(tile, 3), increasing=True)
    infinity = np.eye(max(tile, 3))
    scale = np.array([np.prod([p - q for q in rest]) for p, rest in zip(points, others, strict=True)])
    to_input = np.zeros((size + 1, size + 1))
    for row, roots in enumerate([*others, list(points)]):
        to_input[row, : len(roots) + 1] = polynomial.polyfromroots(roots)
    to_filter = np.vstack([powers[:, :3] / scale[:, None], infinity[2, :3]])
    to_output = np.vstack([powers[:, :tile], infinity[tile - 1, :tile]]).T
    return to_input, to_filter, to_output


class Winograd:
    """A 3x3 convolution of stride 1 with one row of zeros around the image.

    Args:
        weight: [O, C, 3, 3], float32. It is kept in its own form, (tile + 2)^2 / 9 of its size.
        tile: 2 or 4, the side of the tiles that are computed at once.
    """

    def __init__(self, weight: Tensor, tile: int) -> None:
        b, g, a = transforms(tile)
        self.tile, self.n = tile, tile + 2
        self.into, self.out = (torch.from_numpy(np.kron(m, m)).float().to(weight.device) for m in (b, a))
        spread = torch.from_numpy(np.kron(g, g)).to(weight)
        taps = weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
        self.filters = (spread @ taps).view(self.n**2, weight.shape[1], weight.shape[0])

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of x [B, C, H, W], as F.conv2d(x, weight, bias, padding=1), in channels_last."""
        (batch, _, height, width), channels, m = x.shape, self.filters.shape[2], self.tile
        down, across = -(-height // m), -(-width // m)
        result = x.new_empty(batch, down, m, across, m, channels)
        room: dict[str, Tensor] = {}

        def buffer(name: str, *shape: int) -> Tensor:
            size = int(np.prod(shape))
            if name not in room or room[name].numel() < size:
                room[name] = x.new_empty(size)
            return room[name][:size].view(shape)

        for images, rows in parts(batch, down, across):
            tiles = self._tiles(x[images], rows, across, buffer)
            shape = tiles.shape
            taken = buffer("taken", *shape).copy_(tiles).view(self.n**2, -1)
            values = torch.mm(self.into, taken, out=buffer("values", *taken.shape))
            values = values.view(self.n**2, -1, shape[-1])
            products = buffer("products", self.n**2, values.shape[1], channels)
            products = torch.bmm(values, self.filters, out=products).view(self.n**2, -1)
            found = torch.mm(self.out, products, out=buffer("found", m * m, products.shape[1]))
            found = found.view(m, m, *shape[2:5], channels).permute(2, 3, 0, 4, 1, 5)
            if bias is None:
                result[images, rows] = found
            else:
                torch.add(found, bias, out=result[images, rows])
        whole = result.view(batch, down * m, across * m, channels).permute(0, 3, 1, 2)
        return whole[:, :, :height, :width].contiguous(memory_format=torch.channels_last)

    def _tiles(self, x: Tensor, rows: slice, across: int, buffer: Callable[..., Tensor]) -> Tensor:
        """A view [n, n, B, down, across, C] of some rows of the overlapping tiles of x with zeros around it."""
        (batch, channels, height, width), m = x.shape, self.tile
        down, first = rows.stop - rows.start, rows.start * m - 1  # first: the row of x that is the first here
        padded = buffer("padded", batch, down * m + 2, across * m + 2, channels)
        top, bottom = max(0, -first), min(down * m + 2, height - first)
        padded[:, top:bottom, 1 : width + 1] = x[:, :, first + top : first + bottom].permute(0, 2, 3, 1)
        for border in (padded[:, :top], padded[:, bottom:], padded[:, :, :1], padded[:, :, width + 1 :]):
            border.zero_()
        image, row, column, channel = padded.stride()
        size = self.n, self.n, batch, down, across, channels
        return padded.as_strided(size, (row, column, image, row * m, column * m, channel), padded.storage_offset())


def parts(batch: int, down: int, across: int) -> Iterator[tuple[slice, slice]]:
    """(images, rows of tiles): whole images while several have at most TILES tiles, else some rows of one."""
    images = max(1, TILES // (down * across))
    rows = down if images > 1 else max(1, TILES // across)
    for image in range(0, batch, images):
        for row in range(0, down, rows):
            yield slice(image, min(image + images, batch)), slice(row, min(row + rows, down))
