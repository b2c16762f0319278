"""Winograd's convolution is torch's, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.modules.winograd import POINTS, Winograd, parts, transforms

ROUNDING = {2: 2e-6, 4: 1e-5}  # of the largest number, in float32


@pytest.mark.parametrize("tile", POINTS)
def test_transforms_give_the_correlation_exactly(tile: int) -> None:
    b, g, a = transforms(tile)
    rng = np.random.default_rng(0)
    numbers, filters = rng.normal(size=tile + 2), rng.normal(size=3)
    np.testing.assert_allclose(a @ ((g @ filters) * (b @ numbers)), np.correlate(numbers, filters), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    tile=st.sampled_from(sorted(POINTS)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    biased=st.booleans(),
    last=st.booleans(),
)
def test_any_size_in_both_layouts(
    tile: int, batch: int, size: tuple[int, int], channels: tuple[int, int], biased: bool, last: bool
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(batch, channels[0], *size), torch.randn(*reversed(channels), 3, 3)
    bias = torch.randn(channels[1]) if biased else None
    expected = F.conv2d(x.double(), weight.double(), bias.double() if biased else None, padding=1)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    result = Winograd(weight, tile)(x, bias)
    assert (result - expected).abs().max() <= ROUNDING[tile] * expected.abs().max()
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tile", POINTS)
def test_rounding_of_many_channels_and_tiles(tile: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 256, 70, 50), torch.randn(64, 256, 3, 3) / 48
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert (Winograd(weight, tile)(x) - expected).abs().max() <= ROUNDING[tile] * expected.abs().max()


@given(batch=st.integers(1, 5), down=st.integers(1, 200), across=st.integers(1, 200))
def test_parts_cover_every_row_of_every_image_once(batch: int, down: int, across: int) -> None:
    seen = np.zeros((batch, down), dtype=int)
    for images, rows in parts(batch, down, across):
        seen[images, rows] += 1
    assert (seen == 1).all()
