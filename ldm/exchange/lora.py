"""Files of LoRA, of U-Net and text encoder: diffusers' `load_lora_weights` reads them, or kohya's programs do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.errors import UserError
from ldm.exchange.lora_names import ALPHA, LoraNames
from ldm.modules import lora
from ldm.modules.lora import DOWN, UP, summary
from ldm.util import atomic_path
from ldm.weight_files import read_content, tensors_in

FORMATS = ("diffusers", "kohya")


def write(
    weights: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    form: str = "diffusers",
) -> None:
    """Write LoRA weights of a model whose `model.params` are given; their factor alpha / rank is 1.

    Args:
        weights: `<layer>.lora_A.weight` and `<layer>.lora_B.weight` with our names of layers, see `LoraNames`.
        metadata: what the file says of itself. form: one of `FORMATS`.

    Raises:
        UserError: the other program has no such layers.
    """
    from safetensors.torch import save_file

    names = LoraNames(params, ())
    rename = names.kohya if form == "kohya" else names.theirs
    unknown = [key for key in weights if rename(key) is None]
    if unknown:
        raise UserError(f"LoRA: {form} has no such layers: {summary(unknown)}")
    tensors = {rename(key): value.detach().cpu().contiguous() for key, value in weights.items()}
    said = {"format": "pt", **{key: str(value) for key, value in (metadata or {}).items()}}
    if form == "kohya":
        ranks = {layer: len(weights[layer + DOWN]) for layer in lora.layers_of(weights)}
        tensors |= {rename(layer + ALPHA): torch.tensor(float(rank)) for layer, rank in ranks.items()}
        most = str(max(ranks.values()))
        said |= {"ss_network_module": "networks.lora", "ss_network_dim": most, "ss_network_alpha": most}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=said)


def read(
    path: str | os.PathLike[str], params: Mapping[str, Any], shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """What `write`, diffusers' `save_lora_weights` or kohya's programs wrote; alpha / rank is put into B.

    Args:
        params: the model's `model.params`. shapes: those of its weights, by their keys.

    Raises:
        UserError: the file cannot be read, or holds other things than the LoRA of such a model; it lists them.
    """
    layers = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
    names = LoraNames(params, layers)
    weights, alphas, unknown = {}, {}, []
    for key, value in tensors_in(read_content(path)).items():
        ours = names.ours(key)
        if ours is not None and ours.endswith((DOWN, UP)):
            weights[ours] = value
        elif ours is not None and ours.endswith(ALPHA) and value.numel() == 1:
            alphas[ours.removesuffix(ALPHA)] = float(value)
        else:
            unknown.append(key)
    halves = [{key.removesuffix(end) for key in weights if key.endswith(end)} for end in (DOWN, UP)]
    unknown += [f"{layer} (half of it)" for layer in sorted(halves[0] ^ halves[1])]
    unknown += [f"{layer} (alpha alone)" for layer in sorted(alphas.keys() - halves[0] - halves[1])]
    for layer in sorted(halves[0] & halves[1]):
        down, up = weights[layer + DOWN], weights[layer + UP]
        if not _is_product(down, up):
            unknown.append(f"{layer} (its halves, {list(down.shape)} and {list(up.shape)}, do not fit)")
    if unknown or not weights:
        raise UserError(
            f"LoRA '{path}' has keys that are not of this model's LoRA: {summary(unknown) or 'none at all'}"
        )
    for layer, alpha in alphas.items():
        weights[layer + UP] = weights[layer + UP] * (alpha / len(weights[layer + DOWN]))
    lora.check_layers(weights, shapes, str(path))
    return weights


def _is_product(down: torch.Tensor, up: torch.Tensor) -> bool:
    return down.ndim >= 2 and up.ndim >= 2 and up.flatten(1).shape[1] == len(down) > 0


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file of safetensors says of itself; nothing for other kinds of files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], config: DictConfig, form: str) -> None:
    """Write a LoRA file anew as `form`, one of `FORMATS`; `config` is the yaml of the model that it is of.

    Raises:
        UserError: the source is no LoRA of such a model, or the target is no name of a safetensors file.
    """
    from ldm.loading import build_model

    if os.path.splitext(target)[1] != ".safetensors":
        raise UserError(f"LoRA '{target}': must end in .safetensors")
    shapes = {key: value.shape for key, value in build_model(config).state_dict().items()}
    said = {key: value for key, value in read_metadata(source).items() if key != "format"}
    write(read(source, config.model.params, shapes), config.model.params, target, said, form)
