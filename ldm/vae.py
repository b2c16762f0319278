"""Another autoencoder for a loaded model, such as Stable Diffusion's finetuned decoders (`--vae`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ldm import hub
from ldm.checkpoint import KeyReport, StateDict, apply_state_dict, check_file, harmless, read_state_dict
from ldm.errors import UserError
from ldm.exchange import vae
from ldm.exchange.folder import has_weights, read_json, weight_files


def weights_file(path: str | os.PathLike[str], allow_pickle: bool = False) -> Path:
    """The file with an autoencoder's weights: itself, or the one in a folder of diffusers' (or in its `vae/`).

    Args:
        path: a file, a folder, or a model hub's `owner/name`.

    Raises:
        UserError: there is none, or it is no file of weights.
    """
    path = Path(path)
    if not path.exists() and hub.is_hub_name(path):
        path = hub.autoencoder_folder(os.fspath(path))
    if path.is_dir():
        places = [folder for folder in (path, path / "vae") if has_weights(folder)]
        if not places:
            raise UserError(f"--vae: the folder '{path}' has no diffusion_pytorch_model.safetensors or .bin")
        path = weight_files(places[0])[0]
    with _told_of_the_vae():
        check_file(path, allow_pickle)
    return path


@contextmanager
def _told_of_the_vae() -> Iterator[None]:
    """Errors of checkpoints begin with the flag by which this one was named."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--vae: {str(error).removeprefix('checkpoint: ')}") from error


def load_vae(model: nn.Module, path: str | os.PathLike[str], allow_pickle: bool = False) -> None:
    """Replace the weights of a model's autoencoder, in place, by those of a file or folder.

    Args:
        path: an autoencoder alone or a whole model, .ckpt or .safetensors, under CompVis' names or diffusers'; a
            folder of diffusers'; or a model hub's `owner/name`.

    Raises:
        UserError: there are no such weights, or they are another autoencoder's.
    """
    first_stage = model.first_stage_model
    file = weights_file(path, allow_pickle)
    _check_scale(file, model, path)
    with _told_of_the_vae():
        state = _in_our_names(read_state_dict(file, allow_pickle), first_stage)
        report = apply_state_dict(first_stage, state, str(path), assign=True)
    lost = [key for key in report.missing if not harmless(key)]
    if lost:
        raise UserError(f"--vae: '{path}' lacks weights of this autoencoder: {'; '.join(KeyReport(lost).lines()[:3])}")
    first_stage.to(model.device).eval().requires_grad_(False)
    model.origin = {**getattr(model, "origin", {}), "vae": hub.called(path)}


def _check_scale(file: Path, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Stable Diffusion XL's autoencoder has v1's shapes, and latents of another size: its config.json tells them."""
    config = file.with_name("config.json")
    scale = read_json(config).get("scaling_factor") if config.is_file() else None
    own = float(model.scale_factor)
    if scale is not None and abs(scale - own) > 1e-3 * own:
        raise UserError(
            f"--vae: '{path}' is another model's: its latents are scaled by {scale:g}, this model's by {own:g}"
        )


def _in_our_names(state: StateDict, first_stage: nn.Module) -> StateDict:
    """`state` under CompVis' names; diffusers' are told by its `down_blocks`."""
    if not any(key.startswith("encoder.down_blocks.") for key in state):
        return state
    down = first_stage.encoder.down
    table = vae.names({"ch_mult": [1] * len(down), "num_res_blocks": len(down[0].block)})
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        theirs = vae.modern(key)
        renamed[table.ours(theirs) or key] = vae.weight_from_diffusers(theirs, value)
    return renamed
