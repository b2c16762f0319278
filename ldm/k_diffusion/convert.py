"""From k-diffusion's files to ours: its JSON configs, training checkpoints (.pth) and inference checkpoints.

Its configs become yaml, which says in one place what there was a command line for (batch size, checkpoints, samples),
and can be changed there; its weights get our names. Everything else then goes as with models that were trained here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import check_numbers, for_inference
from ldm.errors import UserError
from ldm.exchange.convert import check_keys
from ldm.k_diffusion.config import complete, read_json, to_yaml, unknown_data
from ldm.util import atomic_path, load_yaml
from ldm.weight_files import StateDict, in_precision, kind_of, read_content, save_checkpoint, tensors_in

PREFIX = "model.inner_model."  # of the network's weights in a `KarrasDiffusion`
TARGETS = (".yaml", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Source:
    """What a file holds: the model's yaml, its weights by our names, averaged ones beside them, and a remark if any."""

    config: DictConfig
    state: StateDict
    remark: str | None = None


def convert(source: Path, target: Path, config: Path | None = None, dtype: torch.dtype | None = None) -> Iterator[str]:
    """Read `source`, write `target`; the lines say what was written.

    Args:
        source: k-diffusion's .json, .pth or .safetensors; or a .ckpt of a run of ours.
        target: .yaml for the config alone; .safetensors to sample from, with averaged weights in `dtype`; .ckpt to
            train on from. Beside weights goes their yaml.
        config: the .json (or .yaml, for ours) of a checkpoint that does not bring it.

    Raises:
        UserError: a file cannot be read or does not fit the other, or is no image_v1 model's.
    """
    if target.suffix not in TARGETS:
        raise UserError(f"convert: '{target}' must end in {', '.join(TARGETS)}")
    if source.resolve() == target.resolve():
        raise UserError(f"convert: '{source}' is both the source and the target")
    if source.suffix == ".json":
        if target.suffix != ".yaml":
            raise UserError(f"convert: '{source}' holds no weights; write a .yaml, or name a checkpoint")
        upstream = read_json(source)
        yield write_yaml(OmegaConf.create(to_yaml(upstream)), target)
        yield from remarks(unknown_data(upstream))
        return
    found = read_source(source, config)
    if target.suffix == ".yaml":
        yield write_yaml(found.config, target)
        yield from remarks(found.remark)
        return
    sampling = target.suffix == ".safetensors"
    state = for_inference(found.state) if sampling else found.state
    check_numbers({k: v for k, v in state.items() if v.is_floating_point()}, str(source))
    yield from check_keys(for_inference(found.state), found.config, source)
    written, to_train_on = found.config.copy(), target.with_suffix(".ckpt")  # they may share a yaml
    known = not sampling or to_train_on.is_file()
    written.model.params |= {"ckpt_path": str(to_train_on) if known else None, "grow_from": None}
    save_checkpoint(in_precision(state, dtype), target)
    yield f"{target}: {'averaged weights, to sample from' if sampling else 'weights and average, to train on from'}"
    yield write_yaml(written, target.with_suffix(".yaml"))
    if not sampling:
        yield from remarks(found.remark)


def remarks(remark: str | None) -> Iterator[str]:
    """The remark, where there is one."""
    if remark is not None:
        yield remark


def write_yaml(config: DictConfig, path: Path) -> str:
    """Write a yaml, whole or not at all; a line that says so."""
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    return f"{path}: the model's yaml, for main.py --base"


def read_source(path: Path, config: Path | None) -> Source:
    """What a checkpoint holds, of k-diffusion or of ours.

    Raises:
        UserError: it is neither, or its config is nowhere.
    """
    content = read_content(path)
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint: '{path}' is no checkpoint of k-diffusion")
    if "state_dict" in content:
        return Source(own_yaml(path, config), tensors_in(content["state_dict"]))
    if isinstance(content.get("model_ema"), Mapping):
        upstream = config_of(path, config, content.get("config"))
        return Source(OmegaConf.create(to_yaml(upstream)), trained(content), unknown_data(upstream))
    if any("u_net.d_blocks." in key and not key.startswith(PREFIX) for key in tensors_in(content)):
        upstream = config_of(path, config, metadata_of(path))
        state = {PREFIX + key: value for key, value in tensors_in(content).items()}
        return Source(OmegaConf.create(to_yaml(upstream)), state, unknown_data(upstream))
    raise UserError(f"checkpoint: '{path}' is no checkpoint of k-diffusion: it has no 'model_ema' and no 'state_dict'")


def trained(content: Mapping[str, Any]) -> StateDict:
    """A training checkpoint's weights by our names, and their average with the number of updates that it had."""
    weights = tensors_in(content.get("model") or content["model_ema"])
    average = tensors_in(content["model_ema"])
    updates = int((content.get("ema_sched") or {}).get("last_epoch", 0))
    state = {PREFIX + key: value for key, value in weights.items()}
    buffers = (".kernel", "timestep_embed.weight")  # which are no trained weights, and have no average
    for key, value in average.items():
        if not key.endswith(buffers):
            state["model_ema." + f"inner_model.{key}".replace(".", "")] = value
    state["model_ema.decay"] = torch.tensor(float((content.get("ema_sched") or {}).get("max_value", 1.0)))
    state["model_ema.num_updates"] = torch.tensor(updates, dtype=torch.int)
    return state


def config_of(path: Path, named: Path | None, within: Any) -> dict[str, dict[str, Any]]:
    """A checkpoint's config: the one named, or that within the file, or the .json of its name beside it.

    Raises:
        UserError: there is none.
    """
    beside = path.with_suffix(".json")
    if named is not None:
        return read_json(named)
    if within:
        return complete(within, str(path))
    if beside.is_file():
        return read_json(beside)
    raise UserError(f"checkpoint: '{path}' does not say what model it holds; give its .json with --config")


def metadata_of(path: Path) -> Any:
    """The config that k-diffusion puts into the head of an inference checkpoint; None where there is none."""
    from safetensors import safe_open

    if kind_of(path) != "safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("config", "null"))


def own_yaml(path: Path, config: Path | None) -> DictConfig:
    """The yaml of a checkpoint of ours: the one named, that beside it, or that of its run.

    Raises:
        UserError: there is none.
    """
    candidates = [config] if config else [path.with_suffix(".yaml"), *sorted(path.parent.parent.glob("configs/*.yaml"))]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"checkpoint: '{path}' does not say what model it holds; give its yaml with --config")
    whole = load_yaml(found)
    if not str((whole.get("model") or {}).get("target")).endswith("KarrasDiffusion"):
        raise UserError(f"config: '{found}' is of another model; scripts/convert.py converts those")
    return whole
