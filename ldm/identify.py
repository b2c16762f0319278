"""What model a checkpoint holds: its yaml, when nobody names one."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from ldm.errors import UserError
from ldm.modules.diffusionmodules.unet_layout import UNET, UNetLayout
from ldm.util import load_yaml
from ldm.weight_files import StateDict, kind_of, read_state_dict

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "stable-diffusion"
# Stable Diffusion, told by its U-Net's (width, channels of its input, width of the text); what a file does not say
# of itself is whether it predicts the noise or v.
KNOWN = {
    (320, 4, 768): ("v1-inference.yaml",),
    (320, 9, 768): ("v1-inpainting-inference.yaml",),
    (320, 4, 1024): ("v2-inference.yaml", "v2-inference-v.yaml"),
    (320, 9, 1024): ("v2-inpainting-inference.yaml",),
}
FIRST = f"{UNET}input_blocks.0.0.weight"


def config_of(
    ckpt: str | os.PathLike[str],
    otherwise: str | os.PathLike[str] | None = None,
    *,
    state: StateDict | None = None,
    allow_pickle: bool = False,
) -> DictConfig:
    """The yaml of a checkpoint.

    A diffusers folder has it in its config files. For a file it is the .yaml of the same name beside it, else that
    of the Stable Diffusion whose shapes its weights have, with as many blocks in the U-Net as the weights are of.

    Args:
        ckpt: a .ckpt or .safetensors file, or a folder that diffusers wrote.
        otherwise: the yaml for a file of which nothing else is known.
        state: its weights, when they were read before.
        allow_pickle: unpickle a .ckpt that wants to import other things; it may run any code.

    Raises:
        UserError: the checkpoint cannot be read, or does not say what it holds.
    """
    if kind_of(ckpt) == "diffusers":
        from ldm.exchange.folder import read_config

        return read_config(ckpt)
    beside = Path(ckpt).with_suffix(".yaml")
    if beside.is_file():
        return load_yaml(beside)
    state = read_state_dict(ckpt, allow_pickle) if state is None else state
    names = known_configs(state)
    if len(names) == 1:
        return with_blocks_of(state, load_yaml(CONFIGS / names[0]))
    if names:
        raise UserError(
            f"config: '{ckpt}' is Stable Diffusion v2; give --config configs/stable-diffusion/{names[0]} "
            f"for the base model (512x512) or --config configs/stable-diffusion/{names[1]} for the one of 768x768"
        )
    if otherwise is None:
        raise UserError(f"config: '{ckpt}' does not say what model it holds; give its yaml with --config")
    return load_yaml(otherwise)


def known_configs(state: StateDict) -> tuple[str, ...]:
    """Names of the yaml files in configs/stable-diffusion that weights with these shapes may be of."""
    first = state.get(FIRST)
    texts = {v.shape[1] for k, v in state.items() if k.endswith("attn2.to_k.weight") and v.ndim == 2}
    if first is None or first.ndim != 4 or len(texts) != 1:
        return ()
    return KNOWN.get((first.shape[0], first.shape[1], texts.pop()), ())


def with_blocks_of(state: StateDict, config: DictConfig) -> DictConfig:
    """`config` with the blocks of its U-Net that weights have, where these are fewer: a pruned model (BK-SDM)."""
    layout, params = UNetLayout.of_weights(state), config.model.params.unet_config.params
    if layout is not None and layout != UNetLayout.of_params(params):
        params.update(layout.params())
    return config
