"""Weights and models: what fits where, averaged weights, models without memory. The files are in weight_files.py."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from ldm.mapped import MappedFiles
from ldm.modules.adapters import is_adapter_key
from ldm.util import UserError
from ldm.weight_files import COMPUTED, StateDict, check_file, kind_of, one_line, read_state_dict, save_checkpoint

__all__ = [
    "KeyReport",
    "StateDict",
    "apply_state_dict",
    "check_file",
    "check_numbers",
    "empty_weights",
    "fit_prefix",
    "fold_ema",
    "for_inference",
    "harmless",
    "load_encoders",
    "kind_of",
    "not_finite",
    "load_into",
    "misshapen",
    "read_state_dict",
    "restart_ema",
    "save_checkpoint",
    "uncollected",
]

# Where the weights of a part lie inside a whole model's checkpoint.
PARTS = ("model.", "model.diffusion_model.", "diffusion_model.", "first_stage_model.", "cond_stage_model.")
NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that weights may come in


# ---- loading into a model ----------------------------------------------------------------------------------


@dataclass
class KeyReport:
    """How a checkpoint's keys met a model's."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # file, model

    def notable(self) -> KeyReport:
        """The report without keys that change nothing."""
        missing, unexpected = ([k for k in keys if not harmless(k)] for keys in (self.missing, self.unexpected))
        return KeyReport(missing, unexpected, self.misshapen)

    def lines(self) -> list[str]:
        """One line a kind and module: `missing: first_stage_model.decoder (138 keys, e.g. conv_in.bias)`."""
        out = []
        for word in ("missing", "unexpected", "misshapen"):
            keys = getattr(self, word)
            for module, count in Counter(map(_module_of, keys)).items():
                example = next(key for key in keys if _module_of(key) == module)
                name = example.removeprefix(module + ".")
                if word == "misshapen":
                    there, here = self.misshapen[example]
                    name += f" is {list(there)} in the file and {list(here)} in the model"
                out.append(f"{word}: {module} ({count} key{'s' * (count > 1)}, e.g. {name})")
        return out


def _module_of(key: str) -> str:
    """The module that a key is summed up under: two levels, three inside the U-Net."""
    parts = key.split(".")
    depth = 3 if parts[0] == "model" else 2
    return ".".join(parts[: min(depth, max(1, len(parts) - 1))])


def harmless(key: str) -> bool:
    """Whether a checkpoint may lack `key`, or hold it in vain, without a changed picture."""
    return (
        key.startswith(("model_ema.", "loss.", *COMPUTED))
        or ".loss." in key
        or key.endswith("position_ids")
        or is_adapter_key(key)
    )


def misshapen(state: StateDict, own: StateDict) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes, in the file and in the model, of the keys of `state` that have other shapes in `own`."""
    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own}
    return {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}


def fit_prefix(state: StateDict, names: Iterable[str]) -> StateDict:
    """`state`, or the part of a whole model's checkpoint whose keys are `names`: an autoencoder, a U-Net."""
    names = set(names)
    best, hits = "", sum(key in names for key in state)
    for prefix in PARTS:
        found = sum(key.startswith(prefix) and key.removeprefix(prefix) in names for key in state)
        if found > hits:
            best, hits = prefix, found
    return {k.removeprefix(best): v for k, v in state.items() if k.startswith(best)} if best else state


def apply_state_dict(
    model: nn.Module,
    state: StateDict,
    source: str,
    assign: bool = False,
    ignore_keys: Iterable[str] = (),
    broken: Callable[[], list[str]] | None = None,
) -> KeyReport:
    """Load `state` into `model` in the model's own number types and report what did not fit.

    Args:
        source: the file's name, for messages.
        assign: take the tensors themselves (no copy) where types agree.
        ignore_keys: leave out keys that begin with one of these.
        broken: gives `not_finite(state)` where that is known already.

    Raises:
        UserError: a tensor has another shape than the model's, or no numbers, or no key fits at all.
    """
    own = model.state_dict()
    state = fit_prefix(state, own)
    state = {k: v for k, v in state.items() if not k.startswith(tuple(ignore_keys))}
    report = KeyReport(misshapen=misshapen(state, own))
    if report.misshapen:
        raise UserError(f"checkpoint: '{source}' does not fit this yaml: {'; '.join(report.lines()[:3])}")
    state = {k: v for k, v in state.items() if not _coarse_schedule(k, v)}
    check_numbers({k: v for k, v in state.items() if k in own and own[k].is_floating_point()}, source, broken)
    files = MappedFiles()
    for key in state.keys() & own.keys():
        if state[key].dtype != own[key].dtype:
            mapped = state[key]
            state[key] = mapped.to(own[key].dtype)
            files.release(mapped)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise UserError(f"checkpoint: '{source}' does not fit this yaml: {one_line(error)}") from error
    if own and len(missing) >= len(own):
        raise UserError(f"checkpoint: '{source}' holds nothing for this model; was it made with another yaml?")
    report.missing, report.unexpected = list(missing), list(unexpected)
    return report


def check_numbers(state: StateDict, source: str, broken: Callable[[], list[str]] | None = None) -> None:
    """Raise UserError when weights are quantised (8-bit floats, integers), or are not all finite numbers.

    `broken` may give the keys of those that are not, of these weights and more, where they are known already.
    """
    strange = [k for k, v in state.items() if v.dtype not in NUMBER_TYPES]
    if strange:
        kind = str(state[strange[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"checkpoint: '{source}' has {kind} weights ({_summary(strange)}); quantised weights are not read: "
            "get the file with 16- or 32-bit floats"
        )
    wrong = not_finite(state) if broken is None else [k for k in broken() if k in state]
    if wrong:
        raise UserError(
            f"checkpoint: '{source}' has weights that are no finite numbers ({_summary(wrong)}); "
            "it is damaged, or its training diverged"
        )


def not_finite(state: StateDict) -> list[str]:
    """The keys of weights that are not all finite numbers; all of them are read for that, by several threads."""
    weights = [(k, v) for k, v in state.items() if v.dtype in NUMBER_TYPES and not k.startswith(COMPUTED)]
    weights.sort(key=lambda pair: pair[1].numel())  # so that every thread gets as much
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        broken = pool.map(_not_finite_among, [weights[i::threads] for i in range(threads)])
    return [key for keys in broken for key in keys]


def _not_finite_among(weights: list[tuple[str, torch.Tensor]]) -> list[str]:
    """One call, in which other threads may run: a norm in which anything is not finite is not, either."""
    if torch.isfinite(get_total_norm([value for _, value in weights], foreach=True)):
        return []
    return [key for key, value in weights if not torch.isfinite(value).all()]


def _summary(keys: list[str]) -> str:
    modules = list(dict.fromkeys(map(_module_of, keys)))
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return f"{len(keys)} in {', '.join(modules[:3])}{more}"


def _coarse_schedule(key: str, value: torch.Tensor) -> bool:
    """A noise schedule in half precision: the model's own, computed from the yaml, is exact."""
    return key.startswith(COMPUTED) and value.is_floating_point() and value.dtype.itemsize < 4


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    ignore_keys: Iterable[str] = (),
    allow_pickle: bool = False,
) -> KeyReport:
    """Read a checkpoint into a built model, to train on from it, and say what did not fit.

    Also takes a part (autoencoder, U-Net) out of a whole model's checkpoint. Where the file has no averaged
    weights, the average starts at the loaded ones.

    Raises:
        UserError: the file cannot be read, or a tensor has another shape than the model's.
    """
    report = apply_state_dict(model, read_state_dict(path, allow_pickle), str(path), ignore_keys=ignore_keys)
    if any(key.startswith("model_ema.") for key in report.missing):
        restart_ema(model)
    print("\n  ".join([f"Loaded {path}", *report.notable().lines()]))
    return report


def load_encoders(model: nn.Module, path: Path) -> None:
    """Give a model the autoencoder and the text encoder of a checkpoint of its training, which it is to go on from.

    Of a file all weights are read, of the folder that FSDP writes the encoders' alone.

    Raises:
        UserError: the file cannot be read, or the folder is of another strategy.
    """
    if not path.is_dir():
        load_into(model, path)
        return
    from torch.distributed import checkpoint as shards

    if not (path / ".metadata").is_file():
        raise UserError(
            f"--resume: '{path}' is a folder that cannot be read before training begins, as cache_latents must; "
            "give --actual_resume CKPT too, the model that the run began with"
        )
    reader = shards.FileSystemReader(path)
    names = reader.read_metadata().state_dict_metadata
    parts = ("first_stage_model.", "cond_stage_model.")
    state = {k: torch.empty_like(v) for k, v in model.state_dict().items() if k.startswith(parts)}
    state = {k: v for k, v in state.items() if f"model.{k}" in names}
    shards.load({"model": state}, storage_reader=reader, no_dist=True)
    apply_state_dict(model, state, str(path))
    print(f"Loaded {path}: the encoders")


@torch.no_grad()
def restart_ema(model: nn.Module) -> None:
    """Set the averaged weights of a diffusion model to its present ones."""
    shadows = dict(model.model_ema.named_buffers())
    weights = dict(model.model.named_parameters())
    for name, shadow in model.model_ema.m_name2s_name.items():
        shadows[shadow].copy_(weights[name])


@contextmanager
def empty_weights() -> Iterator[None]:
    """Within the block, new modules have parameters without memory (meta device), and stay where they are.

    Buffers are made as usual. For models whose weights are then loaded with `assign`: nothing is drawn at
    random only to be overwritten.
    """
    register, move = nn.Module.register_parameter, nn.Module.to
    inits = {name: init for name, init in vars(nn.init).items() if name.endswith("_") and callable(init)}

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    def skipped(init: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else init(tensor, *args, **kwargs)

    nn.Module.register_parameter, nn.Module.to = register_empty, lambda module, *args, **kwargs: module
    vars(nn.init).update({name: skipped(init) for name, init in inits.items()})  # slow even without memory
    try:
        with uncollected():
            yield
    finally:
        nn.Module.register_parameter, nn.Module.to = register, move
        vars(nn.init).update(inits)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block no garbage is collected: where many objects are made and none is dropped, looking takes long."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


# ---- writing -----------------------------------------------------------------------------------------------


def fold_ema(state: StateDict) -> tuple[StateDict, bool]:
    """`state` with averaged weights in place of the plain ones and no `model_ema.*`; whether it had any."""
    shadows = {k.removeprefix("model_ema."): v for k, v in state.items() if k.startswith("model_ema.")}
    out = {}
    for key, value in state.items():
        if key.startswith("model_ema."):
            continue
        in_model = key.startswith("model.")
        out[key] = shadows.get(key.removeprefix("model.").replace(".", ""), value) if in_model else value
    return out, bool(shadows)


def for_inference(state: StateDict, ema: bool = True) -> StateDict:
    """What sampling needs of a training checkpoint: no optimiser, losses or second set of weights."""
    state = fold_ema(state)[0] if ema else state
    return {k: v for k, v in state.items() if not k.startswith(("model_ema.", "loss.")) and ".loss." not in k}
