"""Reading and writing weights: .ckpt and .safetensors, running no code and copying nothing needlessly."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.modules.adapters import is_adapter_key
from ldm.pickles import UNSAFE_HINT, foreign_names, refused_names, stand_ins
from ldm.util import UserError, atomic_path

StateDict = dict[str, torch.Tensor]

# What a checkpoint may lack without harm: computed from the yaml, made anew, or used in training only.
COMPUTED = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "logvar")
# Where the weights of a part lie inside a whole model's checkpoint.
PARTS = ("model.", "model.diffusion_model.", "diffusion_model.", "first_stage_model.", "cond_stage_model.")


# ---- reading -----------------------------------------------------------------------------------------------


def kind_of(path: str | os.PathLike[str]) -> str:
    """`torch`, `torch-legacy` or `safetensors`, from the file's first bytes and not its name.

    Raises:
        UserError: there is no such file, or it holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            raise UserError(f"checkpoint: '{path}' is a diffusers folder; give one .ckpt or .safetensors file")
        raise UserError(f"checkpoint: '{path}' is a folder; give a .ckpt or .safetensors file")
    if not path.is_file():
        raise UserError(f"checkpoint: there is no file '{path}'")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"checkpoint: '{path}' is empty")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"checkpoint: '{path}' is a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "torch-legacy"
    if head[8:9] == b"{":
        return "safetensors"
    raise UserError(f"checkpoint: '{path}' is neither a .ckpt nor a .safetensors file")


def check_file(path: str | os.PathLike[str], allow_pickle: bool = False) -> str:
    """What can be said of a checkpoint before it is read: its kind, or a UserError. Nothing in it is run."""
    kind = kind_of(path)
    if kind.startswith("torch") and not allow_pickle:
        names = refused_names(foreign_names(path))
        if names:
            raise UserError(f"checkpoint: '{path}' pickles {', '.join(names[:3])}, {UNSAFE_HINT}")
    return kind


def read_state_dict(path: str | os.PathLike[str], allow_pickle: bool = False) -> StateDict:
    """All tensors of a checkpoint by their names, memory-mapped where the format allows it.

    A `state_dict` level is stepped into, and what lies beside it is left out. Lightning's and OmegaConf's
    objects in old files are read as empty stand-ins: nothing of them is imported or run.

    Args:
        allow_pickle: unpickle whatever the file holds, which may run any code; only for files that you trust.

    Raises:
        UserError: no such file, not a checkpoint, damaged, or a pickle that wants to import other things.
    """
    kind = check_file(path, allow_pickle)
    content = _READERS[kind](Path(path), allow_pickle)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if _is_tensor(v)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"checkpoint: '{path}' holds no tensors by name, so no weights")
    return tensors


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_sparse


def _read_torch(path: Path, allow_pickle: bool) -> object:
    allowed = [] if allow_pickle else stand_ins(foreign_names(path))
    mmap = kind_of(path) == "torch"
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=mmap)
    except Exception as error:  # torch raises nearly every type for damaged files
        raise _damaged(path, error) from error


def _read_safetensors(path: Path, allow_pickle: bool) -> object:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


_READERS: dict[str, Callable[[Path, bool], object]] = {
    "torch": _read_torch,
    "torch-legacy": _read_torch,
    "safetensors": _read_safetensors,
}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"checkpoint: '{path}' cannot be read, it may be damaged: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


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
    model: nn.Module, state: StateDict, source: str, assign: bool = False, ignore_keys: Iterable[str] = ()
) -> KeyReport:
    """Load `state` into `model` in the model's own number types and report what did not fit.

    Args:
        source: the file's name, for messages.
        assign: take the tensors themselves (no copy) where types agree.
        ignore_keys: leave out keys that begin with one of these.

    Raises:
        UserError: a tensor has another shape than the model's, or no key fits at all.
    """
    own = model.state_dict()
    state = fit_prefix(state, own)
    state = {k: v for k, v in state.items() if not k.startswith(tuple(ignore_keys))}
    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own}
    report = KeyReport(misshapen={k: pair for k, pair in shapes.items() if pair[0] != pair[1]})
    if report.misshapen:
        raise UserError(f"checkpoint: '{source}' does not fit this yaml: {'; '.join(report.lines()[:3])}")
    state = {k: v.to(own[k].dtype) if k in own else v for k, v in state.items() if not _coarse_schedule(k, v)}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise UserError(f"checkpoint: '{source}' does not fit this yaml: {_one_line(error)}") from error
    if own and len(missing) >= len(own):
        raise UserError(f"checkpoint: '{source}' holds nothing for this model; was it made with another yaml?")
    report.missing, report.unexpected = list(missing), list(unexpected)
    return report


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

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter, nn.Module.to = register_empty, lambda module, *args, **kwargs: module
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.to = register, move


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


def save_checkpoint(state: StateDict, path: str | os.PathLike[str], half: bool = False) -> None:
    """Write weights as .safetensors, or as .ckpt with CompVis' `state_dict` level; whole or not at all.

    Args:
        half: weights in fp16; noise schedules and the scale factor of the latents stay in fp32.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"checkpoint: '{path}' must end in .safetensors or .ckpt")
    out: StateDict = {}
    for key, value in state.items():
        value = value.detach().cpu()
        shrink = half and value.dtype == torch.float32 and not key.startswith((*COMPUTED, "scale_factor"))
        out[key] = value.half() if shrink else value
    with atomic_path(path) as temporary:
        if suffix == ".ckpt":
            torch.save({"state_dict": out}, temporary)
        else:
            from safetensors.torch import save_file

            save_file({k: v.clone().contiguous() for k, v in out.items()}, temporary, metadata={"format": "pt"})
