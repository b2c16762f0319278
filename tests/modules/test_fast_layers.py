"""Layers that were sped up give what they gave, but for rounding, and are as they were afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldm.modules import fast_layers
from ldm.modules.fast_layers import FastConv, FastLinear, Product, sped_up


@pytest.fixture(autouse=True)
def intel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor runs the tests."""
    monkeypatch.setattr(fast_layers, "mkl_is_slow", lambda: False)


def network(channels: int = 512) -> nn.Module:
    torch.manual_seed(0)
    large = nn.Conv2d(channels, 1024, 3, padding=1, stride=2)
    return nn.Sequential(nn.Conv2d(4, channels, 3, padding=1), nn.GroupNorm(8, channels), large, nn.SiLU())


def test_results_are_the_same_in_both_layouts_and_sizes() -> None:
    net, x = network(), torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        for size in (8, 6):
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x[..., :size, :size].contiguous(memory_format=layout)
                expected = net(given)
                with sped_up(net):
                    result = net(given)
                assert not any("forward" in vars(layer) for layer in net)
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("side", "tile"), [(11, None), (16, 2), (32, 4), (72, 4)])  # the last keeps no filters
def test_the_way_of_a_layer_depends_on_the_image(side: int, tile: int | None) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(128, 130, 3, padding=1), torch.randn(1, 128, side, side)
    assert fast_layers.tile_for(layer, side, side) == tile
    with torch.inference_mode():
        expected = layer(x)
        with sped_up(layer):
            for _ in range(2):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=2e-5)
            filters = layer.forward.filters
    assert (filters.tile if filters else None) == (tile if side < 72 else None)


def test_filters_are_kept_only_when_asked_for() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 32, 32)
    with torch.inference_mode():
        expected = layer(x)
        with sped_up(layer, keep=False):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=2e-5)
            assert layer.forward.filters is None


@pytest.mark.parametrize("other", [{"stride": 2}, {"padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 2}])
def test_other_convolutions_stay_what_they_are(other: dict[str, int]) -> None:
    layer, x = nn.Conv2d(128, 128, 3, **{"padding": 1, **other}), torch.randn(1, 128, 32, 32)
    with torch.inference_mode():
        expected = layer(x)
        with sped_up(layer):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_small_networks_and_other_formats_are_left_alone() -> None:
    for net, layers in ((network(), 2), (network().bfloat16(), 0), (network(64), 0)):
        with sped_up(net):
            assert sum(isinstance(getattr(layer, "forward", None), FastConv) for layer in net) == layers


def test_networks_too_large_for_the_machine_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    for pages, fast in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1}.__getitem__)
        with sped_up(net):
            assert ("forward" in vars(net[2])) is fast


def test_training_and_later_weights_go_the_usual_way() -> None:
    net = network()
    x, plain = torch.randn(1, 4, 8, 8), copy.deepcopy(net)
    plain(x).sum().backward()
    with sped_up(net):
        net(x).sum().backward()  # within the block, too
    torch.testing.assert_close(net[2].weight.grad, plain[2].weight.grad)
    with torch.inference_mode(), sped_up(net):
        before = net(x)
    with torch.no_grad():
        net[2].weight.mul_(2)
        after = net(x)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("slow", [False, True])
def test_training_gives_the_same_gradients_and_sees_every_new_weight(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_layers, "mkl_is_slow", lambda: slow)
    torch.manual_seed(0)
    net = nn.Sequential(*network(), nn.Conv2d(1024, 512, 3, padding=1), nn.Flatten(2), nn.Linear(144, 48))
    plain, x = copy.deepcopy(net), torch.randn(2, 4, 24, 24)
    steps = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, plain)]
    with sped_up(net, keep=False):
        assert isinstance(net[-1].forward, FastLinear) if slow else "forward" not in vars(net[-1])
        for _ in range(2):
            for n, step in zip((net, plain), steps, strict=True):
                step.zero_grad()
                n(x).square().mean().backward()
            for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
            for step in steps:
                step.step()
            with torch.no_grad():  # as in validation
                torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_where_mkl_is_slow_products_are_not_its(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layers, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1, bias=bias), nn.Flatten(2), nn.Linear(256, 48, bias=bias))
    x = torch.randn(2, 128, 16, 16)
    with torch.inference_mode():
        expected = net(x)
        with sped_up(net):
            assert isinstance(net[2].forward, FastLinear)
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=2e-5)
            assert net[0].forward.filters is None
        assert not any("forward" in vars(layer) for layer in net)
    with sped_up(net):
        net(x).sum().backward()
    assert net[2].weight.grad is not None


LAYOUTS = {
    "rows": lambda b, k: torch.randn(b, k),
    "columns": lambda b, k: torch.randn(k, b).t(),
    "one row": lambda b, k: torch.randn(1, k).expand(b, k),
    "one column": lambda b, k: torch.randn(b, 1).expand(b, k),
    "a part": lambda b, k: torch.randn(b, 3 * k)[:, k : 2 * k],
    "every other": lambda b, k: torch.randn(b, 2 * k)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(sizes=st.tuples(*[st.integers(1, 20)] * 3), bias=st.booleans(), summed=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_products_and_their_gradients_are_those_of_a_linear_layer(
    layout: str, sizes: tuple[int, int, int], bias: bool, summed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, width, out = sizes
    x = LAYOUTS[layout](rows, width).requires_grad_()
    inputs = [x, torch.randn(out, width, requires_grad=True), torch.randn(out, requires_grad=True)][: 2 + bias]
    weights = torch.ones(()).expand(rows, out) if summed else torch.randn(rows, out)
    found = []
    for linear in (F.linear, Product.apply):
        y = linear(*inputs, *[None] * (not bias))
        first = torch.autograd.grad(y, inputs, weights, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs[1])  # as a penalty on gradients needs it
        found.append([y, *first, *second])
    for ours, theirs in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_layers_keep_nothing_for_the_backward_pass() -> None:
    layer, kept = nn.Linear(8, 8).requires_grad_(False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        Product.apply(torch.randn(3, 8, requires_grad=True), layer.weight, layer.bias)
    assert kept == [(8, 8)]  # the weight alone


@pytest.mark.parametrize("slow", [False, True])
def test_autocast_and_other_formats_are_left_to_torch(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layers, "mkl_is_slow", lambda: slow)
    net = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Flatten(2), nn.Linear(1024, 16))
    x = torch.randn(1, 128, 32, 32)
    with sped_up(net), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
        assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
