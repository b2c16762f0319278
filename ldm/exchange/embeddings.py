"""Files of textual inversion: diffusers' learned_embeds and the web UIs' embeddings, read without running anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError
from ldm.util import atomic_path

UNNAMED = ("emb_params", "*")  # keys that say nothing: there the file's name is the word


def write(
    vectors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write one word's vectors: `.safetensors` as diffusers does, `.pt` as AUTOMATIC1111's web UI does.

    Both programs read both. Several words can only be kept as .safetensors, which only this project reads then.

    Args:
        vectors: [n, D] for each word. metadata: what a .safetensors says of itself.

    Raises:
        UserError: the file's name ends otherwise.
    """
    from safetensors.torch import save_file

    path = Path(path)
    plain = {word: value.detach().float().cpu().contiguous() for word, value in vectors.items()}
    if path.suffix not in (".safetensors", ".pt") or (path.suffix == ".pt" and len(plain) != 1):
        raise UserError(f"embedding '{path}': must end in .safetensors, or in .pt when it is of one word")
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            said = {"format": "pt", **{key: str(value) for key, value in (metadata or {}).items()}}
            save_file(plain, temporary, metadata=said)
        else:
            ((word, value),) = plain.items()
            torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": value}, "name": word}, temporary)


def read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The words of a file and their vectors [n, D].

    A file that does not say its word is called by its own name, as the web UIs do it.

    Raises:
        UserError: the file cannot be read, is no embedding, or is one of a model with two text encoders.
    """
    from ldm.weight_files import read_content

    content = read_content(path)
    found = words_in(content, Path(path).stem)
    if not found:
        raise UserError(f"embedding '{path}' is no textual inversion of one text encoder")
    if not all(torch.isfinite(value).all() for value in found.values()):
        raise UserError(f"embedding '{path}' holds values that are no finite numbers")
    return found


def words_in(content: object, stem: str) -> dict[str, torch.Tensor]:
    """The words in a file's content, by any program; none where it is something else."""
    if not isinstance(content, Mapping):
        return {}
    if "string_to_param" in content:
        name = content.get("name")
        stem, content = name if isinstance(name, str) and name else stem, content["string_to_param"]
    content = dict(content.items()) if hasattr(content, "items") else {}  # also torch's ParameterDict
    if {"clip_l", "clip_g"} & set(content):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if any(value.ndim not in (1, 2) or "." in key or not value.is_floating_point() for key, value in tensors.items()):
        return {}
    return {stem if key in UNNAMED else key: value.float().reshape(-1, value.shape[-1])
            for key, value in tensors.items()}  # fmt: skip
