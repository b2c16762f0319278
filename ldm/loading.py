"""Models from a yaml and a checkpoint, ready to sample: no random weights first, no second copy in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ldm import hub
from ldm.checkpoint import (
    KeyReport,
    StateDict,
    apply_state_dict,
    empty_weights,
    fold_ema,
    harmless,
    not_finite,
    read_state_dict,
    uncollected,
)
from ldm.exchange.text import with_unused
from ldm.identify import config_of
from ldm.modules import adapters
from ldm.util import UserError, instantiate_from_config, load_yaml, pick_device


def build_model(config: DictConfig) -> nn.Module:
    """The model that a yaml describes, without weights: its parameters have no memory yet.

    Adapters that the yaml puts into the U-Net are left out; `load_model` injects them after the weights.

    Raises:
        UserError: the yaml has no `model:` section, or something in it is wrong.
    """
    _check_section(config)
    config = config.copy()
    _forget_parts(config.model)
    if adapter_config_of(config) is not None:
        unet = config.model.params.unet_config
        del unet.params.adapter_config
        unet.target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    config.model.params.use_ema = False
    with empty_weights():
        return instantiate_from_config(config.model).eval()


def _check_section(config: DictConfig) -> None:
    if "model" not in config or "params" not in (config.model or {}):
        raise UserError("config: there is no `model:` section with `target:` and `params:`")


def _forget_parts(section: DictConfig) -> None:
    """Drop every `ckpt_path`, and what a network grew from: the checkpoint of the whole model holds its parts."""
    for key, value in section.items():
        if key in ("ckpt_path", "grow_from"):
            section[key] = None
        elif isinstance(value, DictConfig):
            _forget_parts(value)


def adapter_config_of(config: DictConfig) -> Any:
    """The `adapter_config` section of a yaml's U-Net, or None."""
    params = (config.model.params.get("unet_config") or {}).get("params") or {}
    return params.get("adapter_config")


def weights_for(config: DictConfig, state: StateDict) -> tuple[StateDict, list[str]]:
    """(what a yaml's model takes of a checkpoint's weights, what is worth knowing of them).

    With `use_ema` (the yaml's, on by default) averaged weights are taken where the file has them.
    """
    section = config.model.params.get("cond_stage_config")
    if isinstance(section, DictConfig):
        state = with_unused(state, section, "cond_stage_model.")
    averaged = any(k.startswith("model_ema.") for k in state)
    if config.model.params.get("use_ema", True):
        note = "the file has no averaged (EMA) weights apart; its weights are used as they are"
        return fold_ema(state)[0], [] if averaged else [note]
    note = "plain weights are used, not the averaged (EMA) ones: use_ema is false in the yaml"
    return {k: v for k, v in state.items() if not k.startswith("model_ema.")}, [note] if averaged else []


def load_weights(
    model: nn.Module,
    config: DictConfig,
    state: StateDict,
    path: str | os.PathLike[str],
    broken: Callable[[], list[str]],
) -> list[str]:
    """Put weights into a model of `build_model`, inject the yaml's adapters, and tell what did not fit, in lines.

    Args:
        state: of `weights_for`. path: where they are from. broken: gives `not_finite(state)`.

    Raises:
        UserError: they do not fit, are no numbers, or some are lacking.
    """
    report = apply_state_dict(model, state, str(path), assign=True, broken=broken)
    empty = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if p.is_meta]
    lost = [key for key in report.missing if not harmless(key)] or empty
    if lost:
        lines = KeyReport(missing=lost).lines()
        raise UserError(f"checkpoint: '{path}' lacks weights of this model: {'; '.join(lines[:4])}")
    adapter_config = adapter_config_of(config)
    if adapter_config is not None:
        unet = model.model.diffusion_model
        adapters.inject(unet, adapter_config)
        prefix = "model.diffusion_model."
        trained = {k.removeprefix(prefix): v for k, v in state.items() if adapters.is_adapter_key(k)}
        if trained:
            apply_state_dict(unet, trained, str(path))
    return KeyReport(unexpected=[k for k in report.unexpected if not harmless(k)]).lines()


@uncollected()
def load_model(
    config: DictConfig | str | os.PathLike[str] | None,
    ckpt: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    adapter_scale: float = 1.0,
    artefacts: Mapping[str | os.PathLike[str], float] | None = None,
    allow_pickle: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:
    """A LatentDiffusion ready to sample, in eval mode on `device`, its weights memory-mapped where possible.

    Args:
        config: a yaml file or its content; None for what the checkpoint says of itself, see `config_of`.
        ckpt: a .ckpt or .safetensors file, a folder that diffusers wrote, or a model hub's `owner/name`.
        device: auto, cuda, cuda:N, mps or cpu.
        adapter_path: a directory of adapters to put into the model: its manifest says which; without one, the
            yaml must have the `adapter_config` that they were trained with.
        adapter_scale: 1 as trained, 0 without effect.
        artefacts: paths of LoRA, adapters, embeddings and the like, and their strengths, see `ldm.artefacts.use`.
        allow_pickle: unpickle a .ckpt that wants to import other things; it may run any code.
        model: what `build_model(config)` made, when that was called before.

    Raises:
        UserError: a file or setting is wrong.
    """
    ckpt = hub.find_checkpoint(ckpt)
    config = config if config is None or isinstance(config, DictConfig) else load_yaml(config)
    device = device if isinstance(device, torch.device) else pick_device(device)
    state = read_state_dict(ckpt, allow_pickle)
    config = config_of(ckpt, state=state) if config is None else config
    _check_section(config)
    state, notes = weights_for(config, state)
    with ThreadPoolExecutor(max_workers=1) as beside:
        broken = beside.submit(not_finite, state)  # reads all weights, meanwhile the model is built
        model = build_model(config) if model is None else model
        notes += load_weights(model, config, state, ckpt, broken.result)
    print("\n  ".join([f"Loaded {ckpt}", *notes]))
    model.origin = {"model": hub.called(ckpt), "adapter": ""}  # for the pictures' settings
    model.yaml_params = config.model.params
    if adapter_path is not None:
        unet = model.model.diffusion_model
        unet.load_adapter_from_dir(adapter_path)
        adapters.set_scale(unet, adapter_scale)
        model.origin["adapter"] = f"{adapter_path} ({adapter_scale:g})"
    model = model.to(device).eval().requires_grad_(False)
    if artefacts:
        from ldm.artefacts import use

        for found in use(model, artefacts):
            print(f"Loaded {found.path}, {found.kind}" + (f": prompts say '{found.trigger}'" if found.trigger else ""))
    return model


SIDES = 8  # pictures' sides in pixels are at least a multiple of this, whatever the model could do


@dataclass(frozen=True)
class Geometry:
    """Sizes that a model has learnt: pixels are a multiple `factor` of latents."""

    height: int  # pixels
    width: int
    channels: int  # of the latents
    factor: int  # pixels a latent, along a side
    multiple: int  # pixels that height and width must be a multiple of

    @classmethod
    def of(cls, model: nn.Module) -> Geometry:
        """Read from the model's own layers."""
        encoder = getattr(model.first_stage_model, "encoder", None)
        factor = 2 ** (len(encoder.down) - 1) if encoder is not None else 1
        blocks = model.model.diffusion_model.input_blocks
        # Residual blocks that resample need even sizes at every level; resampling layers of their own take any.
        halvings = sum(any(getattr(m, "resamples", False) for m in block.modules()) for block in blocks)
        size = model.image_size if isinstance(model.image_size, int) else list(model.image_size)
        height, width = (size, size) if isinstance(size, int) else size
        multiple = math.lcm(SIDES, factor * 2**halvings)
        return cls(height * factor, width * factor, model.channels, factor, multiple)

    def check(self, height: int, width: int) -> None:
        """Raise UserError when pictures of that many pixels cannot be drawn, with the nearest that can."""
        for flag, value in (("--H", height), ("--W", width)):
            if value < 1 or value % self.multiple:
                nearest = max(1, round(value / self.multiple)) * self.multiple
                raise UserError(f"{flag} {value}: must be a multiple of {self.multiple}; the nearest is {nearest}")
