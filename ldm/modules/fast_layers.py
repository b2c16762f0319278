"""Convolutions and linear layers in less time on a CPU.

Which way is the fastest depends on the processor. torch has its matrix products from MKL, which on AMD's processors
reaches less than half of what oneDNN does, and its convolutions from oneDNN. So there linear layers go to oneDNN, in
training too, and convolutions stay there; elsewhere those that nobody trains go by Winograd's algorithm, which is made
of matrix products.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.winograd import Winograd

CHANNELS = 128  # of input and output, from which on the transforms of Winograd's algorithm pay
# Tiles of 4 on 24x24 positions and more, of 2 from 12x12 on, where 4 would take 36/9 of many weights' memory.
TILE_SIDES = {4: 24, 2: 12}
MANY = 256  # tiles for which filters are transformed at every call rather than kept
LARGE = 2**22  # weights of a layer from which on it pays to keep them in oneDNN's layout
SHARE = 0.25  # of the machine's memory that a network's weights may take, for about as much again is needed


@cache
def mkl_is_slow() -> bool:
    """Whether matrix products are MKL's on a processor of AMD."""
    info = Path("/proc/cpuinfo")
    processor = info.read_text(encoding="utf-8") if info.is_file() else platform.processor()
    return torch.backends.mkl.is_available() and "AuthenticAMD" in processor


def is_usual(x: Tensor) -> bool:
    """Whether a layer has to compute as torch does: on another device, in another format, or compiled."""
    ordinary = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return not ordinary or torch.compiler.is_compiling()


class FastConv:
    """Stands in for a convolution's `forward`, in channels_last; what it keeps, it makes at its first call.

    A call that is recorded for a backward pass goes the usual way.
    """

    def __init__(self, layer: nn.Conv2d, keep: bool) -> None:
        self.layer, self.keep = layer, keep
        self.geometry = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        self.filters: Winograd | None = None
        self.packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if torch.is_grad_enabled() or x.ndim != 4 or is_usual(x):
            return nn.Conv2d.forward(layer, x)
        x = x.contiguous(memory_format=torch.channels_last)
        if tile := tile_for(layer, *x.shape[-2:]):
            return self._winograd(x, tile)
        if not self.keep or layer.weight.numel() < LARGE:
            return nn.Conv2d.forward(layer, x)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *self.geometry, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, layer.bias, *self.geometry, "none", [], "")

    def _winograd(self, x: Tensor, tile: int) -> Tensor:
        if not self.keep or len(x) * x.shape[-2] * x.shape[-1] >= MANY * tile**2:
            return Winograd(self.layer.weight, tile)(x, self.layer.bias)
        if self.filters is None or self.filters.tile != tile:
            self.filters = Winograd(self.layer.weight, tile)
        return self.filters(x, self.layer.bias)


class Product(torch.autograd.Function):
    """x [..., K] times the transpose of weight [N, K], plus bias [N], by oneDNN: F.linear and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()  # oneDNN takes both orders, but no gaps
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            Product.apply(gradient, weight.t(), None) if of_x else None,
            _between(rows, x.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _between(gradient: Tensor, x: Tensor) -> Tensor:
    """The transpose of gradient [B, N] times x [B, K]; of both ways oneDNN is fast where the fewer rows come first."""
    if gradient.shape[1] <= x.shape[1]:
        return Product.apply(gradient.t(), x.t(), None)
    return Product.apply(x.t(), gradient.t(), None).t()


class FastLinear:
    """Stands in for a linear layer's `forward`; its products, and those of its gradients, are oneDNN's."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if x.ndim < 2 or not x.numel() or is_usual(x):
            return nn.Linear.forward(layer, x)
        return Product.apply(x, layer.weight, layer.bias)


def tile_for(layer: nn.Conv2d, height: int, width: int) -> int | None:
    """The tile of Winograd's algorithm for an image of that size; None where it does not pay or not hold."""
    if mkl_is_slow() or (layer.kernel_size, layer.stride, layer.padding) != ((3, 3), (1, 1), (1, 1)):
        return None
    if layer.dilation != (1, 1) or layer.groups != 1 or min(layer.in_channels, layer.out_channels) < CHANNELS:
        return None
    return next((tile for tile, side in TILE_SIDES.items() if height * width >= side**2), None)


def fast_forward(layer: nn.Module, keep: bool) -> FastConv | FastLinear | None:
    """What computes a layer faster; None for what is neither of both, in float32 on a CPU whose torch has oneDNN."""
    if type(layer) not in (nn.Conv2d, nn.Linear) or not torch.backends.mkldnn.is_available():
        return None
    if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32:
        return None
    if type(layer) is nn.Linear:
        return FastLinear(layer) if mkl_is_slow() and hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
    plain = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return FastConv(layer, keep) if plain and hasattr(torch.ops.mkldnn, "_convolution_pointwise") else None


def fits(network: nn.Module) -> bool:
    """Whether the machine has room for a second form of the weights: by its whole memory, not by what is free.

    So the last digits of a picture do not depend on what else is running.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # systems that do not say
        return True
    return sum(p.numel() * p.element_size() for p in network.parameters()) <= SHARE * memory


def speed_up(network: nn.Module, keep: bool = True) -> None:
    """Let the layers of a network compute faster, until `slow_down`; with `keep` its weights must not change meanwhile.

    Convolutions of many weights for few positions keep them in the layout in which oneDNN computes, which otherwise
    packs them at every call; 3x3 convolutions of CHANNELS and more go by Winograd's algorithm, or, where MKL is slow,
    linear layers by oneDNN. The results are the same but for rounding. Stable Diffusion v1's U-Net then needs about as
    much memory again as its weights, or, where MKL is slow, a quarter of that; see `fits`.
    Compiled blocks stay as they are.

    Args:
        keep: what was made of the weights, for a network that is called at every step. Without it the weights may
            change, as in training.
    """
    layers = list(_called_directly(network)) if not keep or fits(network) else []
    wide = [layer for layer in layers if isinstance(layer, nn.Conv2d) and min(layer.weight.shape[:2]) >= CHANNELS]
    if wide:  # a small network gains nothing
        for layer in layers:
            if forward := fast_forward(layer, keep):
                layer.forward = forward


def _called_directly(network: nn.Module) -> Iterator[nn.Module]:
    """All parts but those of compiled blocks, which a changed `forward` would have compiled anew."""
    if network._compiled_call_impl is None:
        yield network
        for part in network.children():
            yield from _called_directly(part)


def slow_down(network: nn.Module) -> None:
    """Undo `speed_up`."""
    for layer in network.modules():
        if isinstance(vars(layer).get("forward"), FastConv | FastLinear):
            del layer.forward


@contextmanager
def sped_up(network: nn.Module, keep: bool = True) -> Iterator[None]:
    """Within the block the layers of a network are faster, see `speed_up`."""
    speed_up(network, keep)
    try:
        yield
    finally:
        slow_down(network)
