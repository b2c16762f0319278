"""Folders of diffusers' Stable Diffusion pipelines: read, safely, and written, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.errors import UserError
from ldm.exchange import layout, text
from ldm.exchange.tokenizer import SD_V1_PAD, SD_V2_PAD, write_tokenizer
from ldm.weight_files import (
    PIPELINE,
    StateDict,
    check_file,
    in_precision,
    one_line,
    read_state_dict,
    sha256_of,
    write_tensors,
)

PARTS = ("unet", "vae", "text_encoder")
CONFIGS = {part: f"{part}/config.json" for part in PARTS} | {"scheduler": "scheduler/scheduler_config.json"}
NETWORK_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"  # diffusers' and transformers' own
STEMS = (NETWORK_STEM, TRANSFORMERS_STEM, "pytorch_model")
FORMATS = (".safetensors", ".bin")
VARIANTS = ("", ".fp16", ".bf16")
SUMS = "SHA256SUMS"  # what `sha256sum -c` reads


# ---- reading -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A config file.

    Raises:
        UserError: it is missing or holds no JSON mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"diffusers folder: there is no file '{path}'") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"diffusers folder: '{path}' cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"diffusers folder: '{path}' must hold a JSON mapping")
    return content


def read_config(path: str | os.PathLike[str]) -> DictConfig:
    """The yaml of the model in a pipeline folder.

    Raises:
        UserError: it holds no model of Stable Diffusion v1's or v2's kind.
    """
    path = Path(path)
    index = read_json(path / PIPELINE)
    if not all(part in index for part in PARTS):
        raise UserError(f"diffusers folder: '{path}' holds a {index.get('_class_name')}, which is no Stable Diffusion")
    configs = {part: read_json(path / name) for part, name in CONFIGS.items()}
    try:
        return layout.config_from_diffusers(configs)
    except UserError as error:
        raise UserError(f"diffusers folder '{path}': {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"diffusers folder '{path}': its config files do not go together: {one_line(error)}") from error


def weight_files(part: Path, ema: bool = True) -> list[Path]:
    """The file of a part's weights, or its pieces: safetensors before .bin, full precision before half.

    Args:
        ema: averaged weights; otherwise the plain ones, where the folder has them beside.

    Raises:
        UserError: there are none.
    """
    place = _place_of_weights(part, ema)
    if place is None:
        raise UserError(f"diffusers folder: there are no weights ({STEMS[0]}.safetensors or the like) in '{part}'")
    return _pieces(place) if place.suffix == ".json" else [place]


def has_weights(part: Path) -> bool:
    """Whether a folder holds weights under a name that diffusers or transformers looks for."""
    return _place_of_weights(part, ema=True) is not None


def _place_of_weights(part: Path, ema: bool) -> Path | None:
    """The file of a part's weights, or that which names its pieces."""
    for variant in VARIANTS if ema else (".non_ema", *VARIANTS):
        for suffix in FORMATS:
            for stem in STEMS:
                for name in (f"{stem}{variant}{suffix}", f"{stem}{suffix}.index{variant}.json"):
                    if (part / name).is_file():
                        return part / name
    return None


def _pieces(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"diffusers folder: '{index}' must name the files of the weights beside it")
    return [index.with_name(name) for name in names]


def check_folder(path: str | os.PathLike[str], allow_pickle: bool = False) -> None:
    """Raise UserError for what can be seen of a pipeline folder without reading its weights."""
    read_config(path)
    for part in PARTS:
        for file in weight_files(Path(path) / part):
            check_file(file, allow_pickle)


def read_part(path: Path, allow_pickle: bool = False, ema: bool = True) -> StateDict:
    """The weights of one part of a pipeline, memory-mapped, under diffusers' names."""
    state: StateDict = {}
    for file in weight_files(path, ema):
        state |= read_state_dict(file, allow_pickle)
    return state


def read_folder(
    path: str | os.PathLike[str], allow_pickle: bool = False, ema: bool = True
) -> tuple[StateDict, DictConfig]:
    """(weights under CompVis' names, yaml) of the model in a pipeline folder; its safety checker is left alone.

    Raises:
        UserError: something is missing, damaged, or not Stable Diffusion v1 or v2.
    """
    path = Path(path)
    config = read_config(path)
    parts = {part: read_part(path / part, allow_pickle, ema) for part in PARTS}
    try:
        state, unknown = layout.weights_from_diffusers(parts, config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"diffusers folder '{path}': its weights do not fit its configs: {one_line(error)}") from error
    if unknown:
        some = ", ".join(unknown[:3])
        raise UserError(f"diffusers folder '{path}': {len(unknown)} weights have no place in its model, e.g. {some}")
    return state, config


# ---- writing -----------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is removed otherwise.

    Raises:
        UserError: `path` is something else than a pipeline folder or an empty one, or cannot be written.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / PIPELINE).is_file()):
        raise UserError(f"diffusers folder: '{path}' is there already and is no pipeline; give another name")
    temporary = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        new = temporary / path.name
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if path.is_dir():
            old = temporary / "old"
            path.rename(old)
        new.rename(path)
    except OSError as error:
        if old is not None and old.is_dir() and not path.exists():
            old.rename(path)
        raise UserError(f"diffusers folder: '{path}' cannot be written: {one_line(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """A config file as diffusers writes them: sorted, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(state: StateDict, part: Path, stem: str, as_bin: bool = False) -> None:
    """One part's weights under the file name that its library looks for."""
    part.mkdir(parents=True, exist_ok=True)
    if as_bin:
        name = "pytorch_model.bin" if stem == TRANSFORMERS_STEM else f"{stem}.bin"
        write_tensors(state, part / name, "bin")
    else:
        write_tensors(state, part / f"{stem}.safetensors", "safetensors")


def write_sums(folder: Path) -> None:
    """The hashes of all weights of a pipeline, in one file."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in FORMATS)
    lines = [f"{sha256_of(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: Path) -> bool:
    """Whether a pipeline has hashes, which then are those of its files.

    Raises:
        UserError: a file is missing or is not what was written.
    """
    if not (folder / SUMS).is_file():
        return False
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or sha256_of(file) != expected:
            raise UserError(f"diffusers folder: '{file}' is not the file that {SUMS} was made for")
    return True


def write_folder(
    state: StateDict,
    config: DictConfig,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    as_bin: bool = False,
) -> list[str]:
    """Write a pipeline that diffusers' `from_pretrained` reads, without a safety checker; return the keys left out.

    Args:
        state: weights for sampling under CompVis' names (see `checkpoint.for_inference`). config: their yaml.
        dtype: of the written weights; as they are when None.
        as_bin: pickled weights instead of safetensors.

    Raises:
        UserError: diffusers has no such model, or the place cannot be written to.
    """
    path = Path(path)
    params = config.model.params
    scale = state["scale_factor"] if "scale_factor" in state else params.get("scale_factor", 1.0)
    configs = layout.configs_to_diffusers(config, float(scale))
    parts, unknown = layout.weights_to_diffusers(state, config)
    open_clip = text.is_open_clip(params.cond_stage_config)
    inpainting = params.get("conditioning_key") == "hybrid"
    index = {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    with atomic_folder(path) as new:
        write_json(index, new / PIPELINE)
        for part, name in CONFIGS.items():
            write_json(configs[part], new / name)
        length = configs["text_encoder"]["max_position_embeddings"]
        write_tokenizer(new / "tokenizer", length, SD_V2_PAD if open_clip else SD_V1_PAD)
        for part in PARTS:
            stem = TRANSFORMERS_STEM if part == "text_encoder" else NETWORK_STEM
            write_weights(in_precision(parts.pop(part), dtype), new / part, stem, as_bin)
        write_sums(new)
    return unknown


def rewrite_folder(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    as_bin: bool = False,
    allow_pickle: bool = False,
    ema: bool = True,
) -> None:
    """Copy a pipeline with all its parts and settings, its weights in another precision or format.

    Raises:
        UserError: weights cannot be read, or the place cannot be written to.
    """
    with atomic_folder(target) as new:
        for part in sorted(p for p in source.iterdir() if not p.name.startswith(".")):
            if part.is_file() and part.suffix in (".json", ".md", ".txt"):
                shutil.copyfile(part, new / part.name)
            if not part.is_dir():
                continue
            (new / part.name).mkdir()
            for file in part.iterdir():
                if file.suffix in (".json", ".txt", ".model") and ".index" not in file.name:
                    shutil.copyfile(file, new / part.name / file.name)
            if not any(file.suffix in FORMATS for file in part.iterdir()):
                continue
            stem = TRANSFORMERS_STEM
            if weight_files(part)[0].name.startswith(NETWORK_STEM):
                stem = NETWORK_STEM
            state = read_part(part, allow_pickle, ema)
            write_weights(in_precision(state, dtype), new / part.name, stem, as_bin)
        write_sums(new)
