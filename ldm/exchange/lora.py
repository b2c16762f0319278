"""LoRA of a U-Net as a file: that of diffusers' `load_lora_weights`, `unet.` and peft's names in diffusers' U-Net."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.errors import UserError
from ldm.exchange import unet
from ldm.exchange.layout import PREFIXES
from ldm.modules import lora
from ldm.modules.lora import DOWN, UP, summary
from ldm.util import atomic_path

PREFIX, ALPHA = "unet.", ".alpha"


def write(weights: Mapping[str, torch.Tensor], params: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the LoRA of a U-Net whose `unet_config.params` are given; its factor alpha / rank is 1.

    Args:
        weights: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, with our names of layers.
    """
    from safetensors.torch import save_file

    names = unet.names(params)
    theirs = {key: names.theirs(key) for key in weights}
    unknown = [key for key, name in theirs.items() if name is None]
    if unknown:
        raise UserError(f"LoRA: diffusers' U-Net has no such layers: {summary(unknown)}")
    tensors = {PREFIX + theirs[key]: value.detach().cpu().contiguous() for key, value in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read(path: str | os.PathLike[str], params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What `write` wrote, or diffusers' `save_lora_weights`; alpha / rank, where a file has it, is put into B.

    Raises:
        UserError: the file cannot be read, or holds other things than the LoRA of such a U-Net.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"LoRA '{path}' cannot be read: {error}") from error
    names = unet.names(params)
    weights, alphas, unknown = {}, {}, []
    for key, value in state.items():
        ours = names.ours(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if ours is not None and ours.endswith((DOWN, UP)):
            weights[ours] = value
        elif ours is not None and ours.endswith(ALPHA):
            alphas[ours.removesuffix(ALPHA)] = float(value)
        else:
            unknown.append(key)
    layers = [{key.removesuffix(end) for key in weights if key.endswith(end)} for end in (DOWN, UP)]
    unknown += [f"{layer} (half of it)" for layer in sorted(layers[0] ^ layers[1])]
    if unknown or not weights:
        raise UserError(
            f"LoRA '{path}' has keys that are not of this U-Net's LoRA: {summary(unknown) or 'none at all'}"
        )
    for layer, alpha in alphas.items():
        weights[layer + UP] = weights[layer + UP] * (alpha / len(weights[layer + DOWN]))
    return weights


def merged(
    state: Mapping[str, torch.Tensor], config: DictConfig, files: Mapping[str | os.PathLike[str], float]
) -> dict[str, torch.Tensor]:
    """The weights of a model, with their keys, that LoRA files change: with them, in float32.

    Args:
        state: the model's. config: its yaml. files: LoRA files, and the strength of each; 1 is as trained.

    Raises:
        UserError: a file is not of this U-Net's LoRA.
    """
    inside = PREFIXES["unet"]
    unet_state = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
    changed: dict[str, torch.Tensor] = {}
    for path, strength in files.items():
        weights = read(path, config.model.params.unet_config.params)
        lora.check_layers(weights, {key: value.shape for key, value in unet_state.items()}, str(path))
        for layer in lora.layers_of(weights):
            key = f"{layer}.weight"
            changed[key] = lora.merged(changed.get(key, unet_state[key]), weights, layer, strength)
    return {inside + key: value for key, value in changed.items()}
