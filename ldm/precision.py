"""The number format of a model's weights while it draws."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ldm.errors import UserError

PRECISIONS = ("full", "autocast", "bf16", "fp16")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(model: nn.Module, precision: str) -> AbstractContextManager:
    """Bring a model's weights into the format that `precision` asks for; a context to draw within.

    `full` is float32. `autocast` is half precision on CUDA and float32 elsewhere, as in the original; the weights
    stay float32. `bf16` and `fp16` turn the weights of U-Net, autoencoder and text encoder into that format, which
    halves their memory; the samplers' own arithmetic stays float32. A model that is brought back to float32 keeps
    the rounded weights.

    Raises:
        UserError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: '{precision}' is none of {', '.join(PRECISIONS)}")
    dtype = HALVES.get(precision, torch.float32)
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        if part is not None and dtype_of(part) != dtype:
            part.to(dtype)
    half = precision == "autocast" and model.device.type == "cuda"
    return torch.autocast("cuda", dtype=torch.float16) if half else nullcontext()


def dtype_of(module: nn.Module) -> torch.dtype:
    """The format of a module's floating weights; float32 when it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
