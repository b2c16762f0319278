"""Weights and inputs that are a pure function of names, so that outputs can be compared anywhere."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def tensor_for(key: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of a state-dict key: matrices of unit gain, norms near 1, biases near 0."""
    values = _normal(key, shape)
    if len(shape) > 1:
        values = values / math.sqrt(math.prod(shape[1:]))
    elif key.endswith("weight"):
        values = 1.0 + 0.1 * values
    else:
        values = 0.05 * values
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """Give every floating tensor of `module`'s state dict its value; returns `module`."""
    state = {
        key: tensor_for(prefix + key, tuple(old.shape)).to(old.dtype) if old.is_floating_point() else old
        for key, old in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module


def data(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """A Gaussian input of the given shape and standard deviation."""
    return torch.from_numpy((_normal("data:" + name, shape) * scale).astype(np.float32))


def _normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
