"""LoRA (Hu et al., 2022): low-rank additions to a network's layers, put there by peft, or added to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ldm.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # peft's names of the two matrices


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get a LoRA, and how large.

    Args:
        rank: of the additions; their factor alpha / rank is 1.
        targets: ends of the layers' names.
        init: how the first matrix is drawn; the second is zero, so that nothing changes at first.
    """

    rank: int = 128
    targets: tuple[str, ...] = ATTENTION
    init: str = "gaussian"


def inject(network: nn.Module, config: LoraConfig) -> None:
    """Put LoRA into the layers of `network`; only that is trained from then on.

    Raises:
        UserError: peft is not installed, the rank is below 1, or no layer has such a name.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"LoRA is trained by the package peft, which is not installed: {error}") from error
    if config.rank < 1:
        raise UserError(f"yaml: lora.rank {config.rank}: must be at least 1")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.rank, init_lora_weights=config.init, target_modules=list(config.targets)
    )
    try:
        peft.inject_adapter_in_model(settings, network)
    except ValueError as error:
        raise UserError(f"yaml: lora.targets: no layer's name ends in any of {', '.join(config.targets)}") from error


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA in `network`: `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r]."""
    from peft import get_peft_model_state_dict

    return {key: value.detach() for key, value in get_peft_model_state_dict(network).items()}


def pairs(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(layer, A [r, in, ...], B [out, r, ...]) of LoRA weights."""
    for key, down in weights.items():
        if key.endswith(DOWN):
            layer = key.removesuffix(DOWN)
            yield layer, down, weights[layer + UP]


def check_layers(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str) -> None:
    """Raise UserError, with a list, where layers are not among those of `shapes` (`<layer>.weight`), or do not fit."""
    wrong = []
    for layer, down, up in pairs(weights):
        shape = shapes.get(f"{layer}.weight")
        if shape is None:
            wrong.append(f"{layer} is none of the network's layers")
        elif (up.shape[0], *down.shape[1:]) != tuple(shape):
            wrong.append(f"{layer} is {list(shape)} in the network, and {[up.shape[0], *down.shape[1:]]} in the file")
    if wrong:
        raise UserError(f"LoRA '{source}': {summary(wrong)}")


def summary(lines: Iterable[str], most: int = 5) -> str:
    """Some of `lines` in one, with the number of the others."""
    lines = list(lines)
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


@torch.no_grad()
def merge(state: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor], strength: float = 1.0) -> None:
    """Put W + strength B A in place of the W of each layer in `state`, computed in float32, in the type of W."""
    for layer, down, up in pairs(weights):
        weight = state[f"{layer}.weight"]
        product = up.float().flatten(1) @ down.float().flatten(1)
        state[f"{layer}.weight"] = (weight.float() + strength * product.view(weight.shape).to(weight.device)).to(
            weight.dtype
        )
