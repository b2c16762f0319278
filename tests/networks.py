"""Small networks, and the inputs and error measure, that several tests share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.modules import adapters
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.goldens.fill import data, fill

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"

SPATIAL: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 24,
    "use_checkpoint": False,
    "legacy": False,
}

ADM: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2],
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "num_classes": 10,
    "use_checkpoint": False,
}

TIMESTEPS = torch.tensor([7, 731])


@functools.cache
def _spatial_unet(**changes: Any) -> UNetModel:
    return fill(UNetModel(**SPATIAL | changes)).eval()


def spatial_unet(**changes: Any) -> UNetModel:
    """The small text-conditioned U-Net, filled, in eval mode."""
    return copy.deepcopy(_spatial_unet(**changes))


def adapted_unet(config: Mapping[str, Any]) -> UNetModel:
    """The same with adapters, filled too."""
    unet = spatial_unet()
    adapters.inject(unet, config)
    for name, adapter in adapters.find(unet).items():
        fill(adapter, f"{name}.")
    return unet


def run(unet: UNetModel, name: str = "inj") -> Tensor:
    """Its output for the inputs called `name`, without gradient."""
    with torch.no_grad():
        return unet(data(f"{name}x", (2, 4, 16, 16)), TIMESTEPS, context=data(f"{name}c", (2, 5, 24)))


def relative_error(value: Tensor, reference: Tensor | np.ndarray) -> float:
    """max |difference| / max |reference|."""
    reference = torch.as_tensor(np.asarray(reference))
    return float((value.detach() - reference).abs().max() / reference.abs().max())
