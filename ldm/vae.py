"""Another autoencoder for a loaded model, such as Stable Diffusion's finetuned decoders (`--vae`)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import KeyReport, StateDict, apply_state_dict, check_file, harmless, read_state_dict
from ldm.errors import UserError

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def weights_file(path: str | os.PathLike[str], allow_pickle: bool = False) -> Path:
    """The file with an autoencoder's weights: itself, or what diffusers keeps in a folder (or in its `vae/`).

    Raises:
        UserError: there is none, or it is no file of weights.
    """
    path = Path(path)
    if path.is_dir():
        places = [folder / name for folder in (path, path / "vae") for name in WEIGHT_NAMES]
        found = [place for place in places if place.is_file()]
        if not found:
            raise UserError(f"vae: the folder '{path}' has no {' or '.join(WEIGHT_NAMES)}")
        path = found[0]
    check_file(path, allow_pickle)
    return path


def load_vae(model: nn.Module, path: str | os.PathLike[str], allow_pickle: bool = False) -> None:
    """Replace the weights of a model's autoencoder, in place, by those of a file or folder.

    Args:
        path: an autoencoder alone or a whole model, .ckpt or .safetensors, under CompVis' names or diffusers', or a
            folder of diffusers'.

    Raises:
        UserError: there are no such weights, or they are another autoencoder's.
    """
    first_stage = model.first_stage_model
    file = weights_file(path, allow_pickle)
    state = _in_our_names(read_state_dict(file, allow_pickle), first_stage)
    report = apply_state_dict(first_stage, state, str(path), assign=True)
    lost = [key for key in report.missing if not harmless(key)]
    if lost:
        raise UserError(f"vae: '{path}' lacks weights of this autoencoder: {'; '.join(KeyReport(lost).lines()[:3])}")
    first_stage.to(model.device).eval().requires_grad_(False)
    model.origin = {**getattr(model, "origin", {}), "vae": Path(path).stem}


def _in_our_names(state: StateDict, first_stage: nn.Module) -> StateDict:
    """`state` under CompVis' names; diffusers' are told by its `down_blocks`."""
    if not any(key.startswith("encoder.down_blocks.") for key in state):
        return state
    from ldm.exchange import vae

    down = first_stage.encoder.down
    table = vae.names({"ch_mult": [1] * len(down), "num_res_blocks": len(down[0].block)})
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        theirs = vae.modern(key)
        renamed[table.ours(theirs) or key] = vae.weight_from_diffusers(theirs, value)
    return renamed
