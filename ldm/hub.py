"""Models by their name on a model hub, `owner/name`: from the hub client's cache, or else downloaded there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import UserError

FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")  # what ends so is the name of a file
# No second copies in other formats, no checker (it has a flag of its own).
OTHERS = ["safety_checker/*", "*non_ema*", "*flax*", "*openvino*", "*onnx*", "*.msgpack"]
FORMATS = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")  # of the weights, the preferred first
PIPELINE_PARTS = ("unet/", "vae/", "text_encoder/")
PIPELINE_SETTINGS = ("model_index.json", "*/*.json", "*/*.txt")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether a path that is not there can be a model hub's `owner/model`."""
    owner, _, model = os.fspath(name).partition("/")
    return bool(owner.strip(".") and model) and "/" not in model and not model.endswith(FILES)


def find_checkpoint(ckpt: str | os.PathLike[str]) -> Path:
    """`ckpt` itself, or the folder with the hub's model of that name.

    Raises:
        UserError: there is neither.
    """
    if Path(ckpt).exists() or not is_hub_name(ckpt):
        return Path(ckpt)
    return model_folder(os.fspath(ckpt))


def model_folder(name: str) -> Path:
    """The folder with a hub's pipeline.

    Raises:
        UserError: it is not in the cache and cannot be had.
    """
    found, reason = _snapshot(name, PIPELINE_PARTS, PIPELINE_SETTINGS)
    if found is None:
        raise UserError(f"--ckpt: there is no file '{name}', and the model hub gives none of that name ({reason})")
    return found


def autoencoder_folder(name: str) -> Path:
    """The folder with a hub's autoencoder, or with a pipeline that has one.

    Raises:
        UserError: it is not in the cache and cannot be had.
    """
    for part in ("", "vae/"):
        found, reason = _snapshot(name, (part,), (f"{part}config.json",))
        if found is not None:
            return found
    raise UserError(f"--vae: there is no file '{name}', and the model hub gives none of that name ({reason})")


def _snapshot(name: str, parts: Sequence[str], settings: Sequence[str]) -> tuple[Path | None, str]:
    """(the folder with the weights of all `parts` and the files `settings`, why there is none)."""
    from huggingface_hub import snapshot_download

    reason = ""
    for kept in (True, False):
        for kind in FORMATS:
            patterns = [*settings, *(f"{part}*.{kind}" for part in parts), *(f"{part}*.index*.json" for part in parts)]
            others = OTHERS if kind.startswith("fp16") else [*OTHERS, "*fp16*"]
            try:
                folder = Path(
                    snapshot_download(name, allow_patterns=patterns, ignore_patterns=others, local_files_only=kept)
                )
            except Exception as error:  # the hub's client raises many types
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
                break
            if all(list(folder.glob(f"{part}*.{kind}")) for part in parts):
                return folder, ""
            reason = "it holds no model that diffusers wrote; of other kinds, download the file and give that"
    return None, reason


def called(ckpt: str | os.PathLike[str]) -> str:
    """What people call a checkpoint: a file's name without its ending, a folder's name, the hub's name."""
    path = Path(ckpt)
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    return path.stem if path.suffix in FILES else path.name
