"""Convolutions that keep their weights in the layout in which the processor computes, while pictures are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Weights of a layer from which on it pays: Stable Diffusion's layers of 640 channels and less, on 32x32 positions and
# more, gain nothing.
LARGE = 2**22


class PackedForward:
    """Stands in for a convolution's `forward`; it packs the weights at its first call, for the size that it sees.

    A call that is recorded for a backward pass, compiled, or in another number format goes the usual way.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if torch.is_grad_enabled() or x.dtype != torch.float32 or torch.compiler.is_compiling():
            return nn.Conv2d.forward(layer, x)
        geometry = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        if self.weight is None:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
        out = torch.ops.mkldnn._convolution_pointwise(x, self.weight, layer.bias, *geometry, "none", [], "")
        return out.contiguous() if x.is_contiguous() else out


def suits(layer: nn.Module) -> bool:
    """Whether a layer is a large convolution in float32 on a CPU whose torch can keep packed weights."""
    return (
        type(layer) is nn.Conv2d
        and layer.weight.numel() >= LARGE
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def pack(network: nn.Module) -> None:
    """Let the large convolutions of `network` compute with packed weights; these must not change until `unpack`.

    Otherwise oneDNN packs a layer's weights at every call, which takes up to half of it where there are many weights
    for few positions. The results are the same. It needs as much memory again as these weights (1.9 GB for Stable
    Diffusion v1); those of a mapped file need not stay in memory meanwhile.
    """
    for layer in network.modules():
        if suits(layer):
            layer.forward = PackedForward(layer)


def unpack(network: nn.Module) -> None:
    """Undo `pack`."""
    for layer in network.modules():
        if isinstance(vars(layer).get("forward"), PackedForward):
            del layer.forward


@contextmanager
def packed(network: nn.Module) -> Iterator[None]:
    """Within the block `network` is packed."""
    pack(network)
    try:
        yield
    finally:
        unpack(network)
