"""Adapter directories: a file for each module, as the adapter paper's repository writes them, and a manifest.

A transformer adapter is written twice, as `<block>.adapter_inout.pt` and, its inner sequence alone, as
`<block>.adapter_inout.adp.pt`; a residual adapter once, as `<block>.adapter.pt`. The original's reader looks
for these names and leaves others alone, so it takes our directories; its own have no manifest, and cannot be
understood without the yaml that they were trained with.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules import adapters
from ldm.modules.adapters import DEFAULT_SET, Adapter, TransformerAdapter

MANIFEST = "adapter_config.json"
FORMAT_VERSION = 1


def save(
    unet: nn.Module,
    path: str | os.PathLike[str],
    trained_on: Mapping[str, Any] | None = None,
    adapter_set: str = DEFAULT_SET,
) -> None:
    """Write the adapters of one set to the directory `path`, which appears whole or not at all.

    `trained_on` (anything that JSON can say) is kept in the manifest. An earlier adapter directory is
    replaced.

    Raises:
        UserError: there are no such adapters, or `path` holds something that is no adapter directory.
    """
    path = Path(path)
    found = _by_file_name(unet, adapter_set)
    if not found:
        raise UserError(f"nothing to save in '{path}': the U-Net has no adapters in the set '{adapter_set}'")
    if path.exists() and not _replaceable(path):
        raise UserError(f"adapter directory: '{path}' holds other files; give the name of a new directory")
    manifest = {
        "format_version": FORMAT_VERSION,
        "adapter_config": adapters.render_config(_specs(found)),
        "parameters": sum(p.numel() for adapter in found.values() for p in adapter.parameters()),
        "trained_on": dict(trained_on or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        new = Path(beside) / "new"
        new.mkdir()
        for name, adapter in found.items():
            state = {key: value.detach().cpu().clone() for key, value in adapter.state_dict().items()}
            torch.save(state, new / f"{name}.pt")
            if isinstance(adapter, TransformerAdapter):
                torch.save({key.removeprefix("adp."): v for key, v in state.items()}, new / f"{name}.adp.pt")
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8")
        if path.exists():
            os.replace(path, Path(beside) / "old")
        os.replace(new, path)


def load(unet: nn.Module, path: str | os.PathLike[str], adapter_set: str = DEFAULT_SET) -> None:
    """Read a directory that `save`, or the original, wrote, into the adapters of one set.

    When that set is not in place yet and there is a manifest, the adapters that it describes are injected
    first. Everything is checked before anything is changed.

    Raises:
        UserError: the directory is missing, incomplete, damaged, of another config, or says too little.
    """
    path = Path(path)
    manifest = read_manifest(path)
    injected = not adapters.find(unet, adapter_set)
    if injected:
        if manifest is None:
            raise UserError(
                f"adapter directory: '{path}' has no {MANIFEST} (the original writes none); "
                "build the model from the yaml that it was trained with (--config)"
            )
        adapters.inject(unet, manifest["adapter_config"], adapter_set)
    try:
        found = _by_file_name(unet, adapter_set)
        if manifest is not None:
            _check_same_config(path, manifest["adapter_config"], _specs(found))
        states = _read_states(path, found)
    except UserError:
        if injected:
            adapters.eject(unet, adapter_set)
        raise
    for name, adapter in found.items():
        adapter.load_state_dict(states[name])


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The checked manifest of an adapter directory; None when it has none, as the original's have not.

    Raises:
        UserError: `path` is no adapter directory, or its manifest is damaged or of a newer format.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise UserError(f"adapter directory: '{path}' {what}; it is named like .../checkpoints/500-adapters")
    if not any(path.glob("*.pt")):
        raise UserError(f"adapter directory: '{path}' holds no adapter files (*.pt)")
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            adapters.parse_config(manifest["adapter_config"])
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"adapter directory: '{file}' is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"adapter directory: '{file}' has format_version {version!r}; this program reads {FORMAT_VERSION}"
        )
    return manifest


def _replaceable(path: Path) -> bool:
    return path.is_dir() and all(file.suffix == ".pt" or file.name == MANIFEST for file in path.iterdir())


def _by_file_name(unet: nn.Module, adapter_set: str) -> dict[str, Adapter]:
    """File name without `.pt` -> adapter; those of a set that is alone are the modules' names."""
    found = adapters.find(unet, adapter_set)
    return {f"{name.rpartition('.')[0]}.{adapter.file_stem}": adapter for name, adapter in found.items()}


def _specs(found: Mapping[str, Adapter]) -> list[adapters.AdapterSpec]:
    """The specs of a set, each once, in the order in which `parse_config` gave them."""
    first = {(adapters.FAMILIES.index(a.spec.family), a.number): a.spec for a in found.values()}
    return [first[place] for place in sorted(first)]


def _check_same_config(path: Path, saved: Mapping[str, Any], specs: list[adapters.AdapterSpec]) -> None:
    """What changes the network's function must agree; how new adapters start does not matter any more."""

    def essence(spec: adapters.AdapterSpec) -> dict[str, Any]:
        entry = spec.to_config()
        entry["method"] = adapters.ACTIVATIONS[spec.method].__name__
        del entry["init"]
        return {f"{spec.family.key}.{key}": value for key, value in entry.items()}

    theirs, ours = [essence(s) for s in adapters.parse_config(saved)], [essence(s) for s in specs]
    if theirs == ours:
        return
    if len(theirs) != len(ours):
        difference = f"{len(theirs)} adapters a block, the model's config has {len(ours)}"
    else:
        differing = [
            f"{key} {old[key]!r}, the model's config says {new.get(key)!r}"
            for old, new in zip(theirs, ours, strict=True)
            for key in old
            if old[key] != new.get(key)
        ]
        difference = differing[0]
    raise UserError(
        f"adapter directory: '{path}' was trained with {difference}; use the config it was trained with "
        "(a weaker or stronger effect is --adapter_scale)"
    )


def _read_states(path: Path, found: Mapping[str, Adapter]) -> dict[str, dict[str, Tensor]]:
    """File name without `.pt` -> a state dict that fits the adapter of that name, for every adapter."""
    present = {file.name.removesuffix(".pt") for file in path.glob("*.pt")}
    inner = {f"{name}.adp": name for name, adapter in found.items() if isinstance(adapter, TransformerAdapter)}
    missing = sorted(name for name in found if name not in present and f"{name}.adp" not in present)
    unexpected = sorted(present - set(found) - set(inner))
    for names, what in ((missing, "lacks"), (unexpected, "has files for adapters that the model has not:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"adapter directory: '{path}' {what} {names[0]}.pt{more}; it was trained with another config"
            )
    states: dict[str, dict[str, Tensor]] = {}
    for name in sorted(present, key=len):
        state = _read_file(path / f"{name}.pt")
        if name in inner:
            state = {f"adp.{key}": value for key, value in state.items()}
        adapter_name = inner.get(name, name)
        _check_fits(path / f"{name}.pt", state, found[adapter_name])
        first = states.setdefault(adapter_name, state)
        if any(not torch.equal(first[key], value) for key, value in state.items()):
            raise UserError(f"adapter directory: '{path}' holds two different versions of {adapter_name}.pt")
    return states


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets garbage with errors of any type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"adapter directory: '{file}' cannot be read as tensors: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"adapter directory: '{file}' holds no state dict")
    return dict(state)


def _check_fits(file: Path, state: Mapping[str, Tensor], adapter: Adapter) -> None:
    wanted = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if wanted.keys() != given.keys():
        raise UserError(f"adapter directory: '{file}' holds {sorted(given)}, the model needs {sorted(wanted)}")
    for key, shape in wanted.items():
        if given[key] != shape:
            raise UserError(
                f"adapter directory: '{file}' holds {key} of shape {list(given[key])}, "
                f"the model's config wants {list(shape)}; it was trained with another mid_dim or base model"
            )
        if not torch.isfinite(state[key]).all():
            raise UserError(f"adapter directory: '{file}' holds values of {key} that are not finite")
