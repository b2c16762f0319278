"""The few helpers that everything uses: objects from yaml, files that appear whole, devices."""

from __future__ import annotations

import importlib
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ldm.errors import UserError

__all__ = [
    "UserError",
    "atomic_path",
    "count_params",
    "default",
    "disabled_train",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "load_yaml",
    "pick_device",
]

T = TypeVar("T")


def exists(value: Any) -> bool:
    """Whether `value` is not None."""
    return value is not None


def default(value: T | None, fallback: T) -> T:
    """`value`, or `fallback` when it is None; a callable fallback is called only when it is needed."""
    if value is not None:
        return value
    return fallback() if callable(fallback) and not isinstance(fallback, type) else fallback


def count_params(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters of `model`, of those that receive gradients when `trainable`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def get_obj_from_str(path: str, reload: bool = False) -> Any:
    """The class or function behind a dotted path such as `ldm.models.autoencoder.AutoencoderKL`.

    Raises:
        UserError: the module or the name in it does not exist.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"target: '{path}' is not a dotted path such as 'package.module.Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UserError(f"target: '{path}': there is no module '{error.name}'") from error
        raise
    if reload:
        module = importlib.reload(module)
    if not hasattr(module, name):
        raise UserError(f"target: '{path}': the module '{module_name}' has no '{name}'")
    return getattr(module, name)


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """Build the object that a yaml section `{target: dotted.path, params: {...}}` describes.

    `extra` keyword arguments are added to `params` and win over them. The strings `__is_first_stage__` and
    `__is_unconditional__`, which CompVis' yaml uses in place of a section, give None.

    Raises:
        UserError: there is no `target`, it cannot be found, or it does not take one of the `params`, by name or
            because it is a word where a number belongs.
    """
    if isinstance(config, str) and config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not isinstance(config, (dict, DictConfig)) or "target" not in config:
        raise UserError(f"yaml: expected a section with `target:` and `params:`, found {_brief(config)}")
    target = get_obj_from_str(config["target"])
    params = config.get("params") or {}
    if not isinstance(params, (dict, DictConfig)):
        raise UserError(f"yaml: `params` of {config['target']} must be a mapping, found {_brief(params)}")
    _check_numbers(target, params, str(config["target"]))
    try:
        return target(**({str(k): v for k, v in params.items()} | extra))
    except TypeError as error:
        if "argument" in str(error) and "__init__()" in str(error):
            raise UserError(f"yaml: params of {config['target']}: {error}") from error
        raise


def _check_numbers(target: Any, params: Mapping[str, Any], name: str) -> None:
    """Raise UserError where `params` have a string for a parameter that is annotated as a number or a truth value."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # written in C
        return
    for parameter in parameters:
        value = params.get(parameter.name)
        kinds = set(str(parameter.annotation).split(" | ")) - {"None"}
        if isinstance(value, str) and kinds and kinds <= {"int", "float", "bool"}:
            wanted = " or ".join(sorted({"bool": "true or false"}.get(kind, "a number") for kind in kinds))
            raise UserError(f"yaml: params of {name}: {parameter.name} is {value!r}; it must be {wanted}")


def _brief(value: Any) -> str:
    text = repr(OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def load_yaml(*paths: str | os.PathLike[str], overrides: list[str] | None = None) -> DictConfig:
    """Several yaml files merged left to right, then dotlist `overrides` such as `model.params.x=1`.

    Raises:
        UserError: a file is missing or is no yaml mapping, or an override is not `key=value`.
    """
    import yaml

    parts = []
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"config: there is no file '{path}'")
        try:
            part = OmegaConf.load(path)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"config: '{path}' is not valid yaml: {' '.join(str(error).split())}") from error
        if not isinstance(part, DictConfig):
            raise UserError(f"config: '{path}' must hold a mapping (model:, data:, lightning:) at its top")
        parts.append(part)
    for override in overrides or []:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"override: '{override}' is not of the form key.subkey=value")
    try:
        return OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides or [])))
    except Exception as error:
        raise UserError(f"config: cannot merge: {' '.join(str(error).split())}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that is renamed to it when the block ends well, and removed otherwise.

    Readers see the old file or the whole new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train()` of a frozen model, so that nothing switches it back from eval mode."""
    return self


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU; a named device that is not there is a UserError."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind = name.partition(":")[0]
    if kind not in available:
        raise UserError(f"--device {name}: expected auto, cuda, cuda:N, mps or cpu")
    if not available[kind]:
        raise UserError(f"--device {name}: this machine has no {kind} device; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected auto, cuda, cuda:N, mps or cpu") from error
