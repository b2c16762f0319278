"""LoRA (Hu et al., 2022): low-rank additions to a network's layers, put there by peft, or added to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm.errors import UserError

INITS = ("gaussian", True)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # of CLIP's text encoder
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # peft's names of the two matrices


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get a LoRA, and how large.

    Args:
        rank: of the additions. alpha: their factor is alpha / rank; None for alpha = rank.
        targets: ends of the U-Net's layers' names.
        text_targets: those of the text encoder's layers, e.g. `TEXT_ATTENTION`; none by default.
        init: how the first matrix is drawn, `gaussian` or by peft's own rule (true). The second is zero, so that
            nothing changes at first.
    """

    rank: int = 128
    alpha: float | None = None
    targets: tuple[str, ...] = ATTENTION
    text_targets: tuple[str, ...] = ()
    init: str | bool = "gaussian"

    @classmethod
    def read(cls, section: Mapping[str, Any] | None) -> LoraConfig:
        """That of a yaml's `lora_config`.

        Raises:
            UserError: it has an unknown key, or a value that cannot be.
        """
        settings = dict(section or {})
        unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
        if unknown:
            raise UserError(f"yaml: lora_config: '{unknown[0]}' is none of {', '.join(cls.__dataclass_fields__)}")
        settings["targets"] = tuple(settings.get("targets", ATTENTION))
        settings["text_targets"] = tuple(settings.get("text_targets") or ())
        config = cls(**settings)
        if type(config.rank) is not int or config.rank < 1:
            raise UserError(f"yaml: lora_config.rank is {config.rank!r}; it must be a whole number of at least 1")
        if config.init not in INITS:  # others of peft's change the weights beside them
            raise UserError(f"yaml: lora_config.init is {config.init!r}; it must be gaussian or true")
        if config.alpha is not None and (type(config.alpha) not in (int, float) or config.alpha <= 0):
            raise UserError(f"yaml: lora_config.alpha is {config.alpha!r}; it must be a number above 0")
        return config


def inject(network: nn.Module, config: LoraConfig, targets: Sequence[str] | None = None) -> None:
    """Put LoRA into the layers of `network`; only that is trained from then on.

    Args:
        targets: ends of the layers' names in place of the config's.

    Raises:
        UserError: peft is not installed, or no layer has such a name.
    """
    targets = list(config.targets if targets is None else targets)
    try:
        import peft
    except ImportError as error:
        raise UserError(f"LoRA is trained by the package peft, which is not installed: {error}") from error
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, init_lora_weights=config.init, target_modules=targets
    )
    try:
        peft.inject_adapter_in_model(settings, network)
    except ValueError as error:
        raise UserError(f"yaml: lora_config.targets: no layer's name ends in any of {', '.join(targets)}") from error


def is_in(network: nn.Module) -> bool:
    """Whether `inject` has put LoRA into `network`."""
    return hasattr(network, "peft_config")


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA in `network`: `<layer>.lora_A.weight` [r, in], `<layer>.lora_B.weight` [out, r], alpha / rank in B."""
    from peft import get_peft_model_state_dict

    (config,) = network.peft_config.values()
    factor = config.lora_alpha / config.r
    state = {key: value.detach() for key, value in get_peft_model_state_dict(network).items()}
    return {key: value * factor if key.endswith(UP) and factor != 1 else value for key, value in state.items()}


def weights_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA in a model's U-Net and text encoder, with the names of layers that the model's checkpoints have."""
    found = {f"model.diffusion_model.{key}": value for key, value in weights_of(model.model.diffusion_model).items()}
    text = getattr(model.cond_stage_model, "transformer", None)
    if text is not None and is_in(text):
        prefix = "cond_stage_model.transformer.text_model."
        found |= {prefix + key.removeprefix("text_model."): value for key, value in weights_of(text).items()}
    return found


def layers_of(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the layers that LoRA weights are of."""
    return [key.removesuffix(DOWN) for key in weights if key.endswith(DOWN)]


def check_layers(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str) -> None:
    """Raise UserError, with a list, where layers are not among those of `shapes` (`<layer>.weight`), or do not fit."""
    wrong = []
    for layer in layers_of(weights):
        shape, fitting = shapes.get(f"{layer}.weight"), _product_shape(weights, layer)
        if shape is None:
            wrong.append(f"{layer} is none of the network's layers")
        elif fitting != tuple(shape):
            wrong.append(f"{layer} is {list(shape)} in the network, and {list(fitting)} in the file")
    if wrong:
        raise UserError(f"LoRA '{source}': {summary(wrong)}")


def summary(lines: Iterable[str], most: int = 5) -> str:
    """Some of `lines` in one, with the number of the others."""
    lines = list(lines)
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


def _product_shape(weights: Mapping[str, torch.Tensor], layer: str) -> tuple[int, ...]:
    return (len(weights[layer + UP]), *weights[layer + DOWN].shape[1:])


@torch.no_grad()
def merged(weight: torch.Tensor, weights: Mapping[str, torch.Tensor], layer: str, strength: float) -> torch.Tensor:
    """W + strength B A of one layer, in float32."""
    down, up = weights[layer + DOWN], weights[layer + UP]
    product = up.float().flatten(1) @ down.float().flatten(1)
    return weight.float() + strength * product.view(weight.shape).to(weight.device)
