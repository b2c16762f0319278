"""Convolutions with packed weights give what they gave, and are as they were afterwards."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ldm.modules.packing import PackedForward, packed


def network(channels: int = 512) -> nn.Module:
    torch.manual_seed(0)
    large = nn.Conv2d(channels, 1024, 3, padding=1, stride=2)
    return nn.Sequential(nn.Conv2d(4, channels, 1), nn.GroupNorm(8, channels), large, nn.SiLU())


def test_results_are_the_same_in_both_layouts_and_sizes() -> None:
    net, x = network(), torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        for size in (8, 6):
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x[..., :size, :size].contiguous(memory_format=layout)
                expected = net(given)
                with packed(net):
                    result = net(given)
                assert "forward" not in vars(net[2])
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
                assert result.is_contiguous(memory_format=layout)


def test_only_large_layers_in_float32_are_packed() -> None:
    for net, layers in ((network(), 1), (network().bfloat16(), 0), (network(256), 0)):
        with packed(net):
            assert sum(isinstance(layer.forward, PackedForward) for layer in net) == layers


def test_training_and_later_weights_go_the_usual_way() -> None:
    net = network()
    x, plain = torch.randn(1, 4, 8, 8), copy.deepcopy(net)
    plain(x).sum().backward()
    with packed(net):
        net(x).sum().backward()  # within the block, too
    torch.testing.assert_close(net[2].weight.grad, plain[2].weight.grad)
    with torch.inference_mode(), packed(net):
        before = net(x)
    with torch.no_grad():
        net[2].weight.mul_(2)
        after = net(x)
    assert not torch.allclose(before, after)
