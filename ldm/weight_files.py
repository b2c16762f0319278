"""Files of weights: .ckpt and .safetensors, read without running or copying anything; written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.errors import UserError
from ldm.pickles import UNSAFE_HINT, check_archive, foreign_names, refused_names, stand_ins
from ldm.util import atomic_path

StateDict = dict[str, torch.Tensor]

# What every model computes from its yaml; kept exact when weights are shortened to 16 bits.
COMPUTED = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "logvar")
TORCH = ("torch", "torch-legacy")  # kinds of files that are pickled
SUFFIXES = (".safetensors", ".ckpt")
PIPELINE = "model_index.json"  # what makes a folder a diffusers pipeline
# The levels below a text encoder's `text_model.`, which some tools leave out.
TEXT_LEVELS = ("embeddings.", "encoder.", "final_layer_norm.")
CLIP_PREFIX = "cond_stage_model.transformer."
HASH_SUFFIX = ".sha256"  # beside a file: what `sha256sum -c` reads


# ---- reading -----------------------------------------------------------------------------------------------


def kind_of(path: str | os.PathLike[str]) -> str:
    """`torch`, `torch-legacy` or `safetensors` from the file's first bytes and not its name, or `diffusers`.

    Raises:
        UserError: there is no such file, or it holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        if (path / PIPELINE).is_file():
            return "diffusers"
        raise UserError(
            f"checkpoint: '{path}' is a folder without {PIPELINE}; "
            "give a .ckpt or .safetensors file, or a folder that diffusers wrote"
        )
    if not path.is_file():
        raise UserError(f"checkpoint: there is no file '{path}'")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"checkpoint: '{path}' cannot be read: {one_line(error)}") from error
    if not head:
        raise UserError(f"checkpoint: '{path}' is empty")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"checkpoint: '{path}' is a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch-legacy"
    if head[8:9] == b"{":
        _check_header(path, int.from_bytes(head[:8], "little"))
        return "safetensors"
    raise UserError(f"checkpoint: '{path}' is neither a .ckpt nor a .safetensors file")


def _check_header(path: Path, length: int) -> None:
    size = path.stat().st_size
    if 8 + length > size:
        raise UserError(
            f"checkpoint: '{path}' cannot be read, it may be damaged: "
            f"its header claims {length:,} bytes, the whole file has {size:,}"
        )


def check_file(path: str | os.PathLike[str], allow_pickle: bool = False) -> str:
    """What can be said of a checkpoint before it is read: its kind, or a UserError. Nothing in it is run."""
    kind = kind_of(path)
    if kind == "diffusers":
        from ldm.exchange.folder import check_folder

        check_folder(path, allow_pickle)
    elif kind in TORCH and not allow_pickle:
        _bystanders(path)
    return kind


def _bystanders(path: str | os.PathLike[str]) -> list[str]:
    """What a torch file names beside its weights; a UserError if that is more than is known to be harmless."""
    names = foreign_names(path)
    refused = refused_names(names)
    if refused:
        raise UserError(f"checkpoint: '{path}' pickles {', '.join(refused[:3])}, {UNSAFE_HINT}")
    return names


def read_state_dict(path: str | os.PathLike[str], allow_pickle: bool = False) -> StateDict:
    """All tensors of a checkpoint by their names, memory-mapped where the format allows it.

    A `state_dict` level is stepped into, and what lies beside it is left out. Lightning's and OmegaConf's
    objects in old files are read as empty stand-ins: nothing of them is imported or run. The weights of a
    diffusers folder get CompVis' names, and so do text encoders that other tools wrote.

    Args:
        allow_pickle: unpickle whatever the file holds, which may run any code; only for files that you trust.

    Raises:
        UserError: no such file, not a checkpoint, damaged, or a pickle that wants to import other things.
    """
    if kind_of(path) == "diffusers":
        from ldm.exchange.folder import read_folder

        return read_folder(path, allow_pickle)[0]
    content = read_content(path, allow_pickle)
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = tensors_in(content)
    if not tensors and isinstance(content, Mapping) and tensors_in(content.get("model_ema")):
        raise UserError(
            f"checkpoint: '{path}' is a training checkpoint of k-diffusion; make one of ours of it with "
            "scripts/convert_karras.py"
        )
    if not tensors:
        raise UserError(f"checkpoint: '{path}' holds no tensors by name, so no weights{_hint_at_level(content)}")
    return {with_text_level(key): value for key, value in tensors.items()}


def read_content(path: str | os.PathLike[str], allow_pickle: bool = False) -> object:
    """All that a file holds: a mapping of tensors, or what else was pickled, with stand-ins as in `read_state_dict`.

    Raises:
        UserError: as `read_state_dict`.
    """
    kind = kind_of(path)
    _read_ahead(path)
    return _read_torch(Path(path), kind, allow_pickle) if kind in TORCH else _read_safetensors(Path(path))


def _read_ahead(path: str | os.PathLike[str]) -> None:
    """Ask the system to fetch a file that is going to be read as a whole, in larger pieces than it would by itself."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file, suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def with_text_level(key: str, prefix: str = CLIP_PREFIX) -> str:
    """A key of SD v1's text encoder with its `text_model.` level, which some files and transformers 5 leave out.

    `prefix` is what comes before that level.
    """
    rest = key.removeprefix(prefix)
    return f"{prefix}text_model.{rest}" if key.startswith(prefix) and rest.startswith(TEXT_LEVELS) else key


def tensors_in(content: object) -> StateDict:
    """The named tensors at the top of a checkpoint's content."""
    if not isinstance(content, Mapping):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and _is_tensor(v)}


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_sparse


def _hint_at_level(content: object, levels: int = 4) -> str:
    """Where in a nested checkpoint the tensors are, for the message; looks a few levels deep."""
    queue: list[tuple[str, object, int]] = [("", content, 0)]
    for name, value, depth in queue:
        found = tensors_in(value)
        if found:
            return f" (they lie deeper, under '{name}': {len(found)} tensors; save that level as a file of its own)"
        if isinstance(value, Mapping) and depth < levels:
            queue += [(f"{name}.{k}".strip("."), v, depth + 1) for k, v in value.items() if isinstance(k, str)]
    return ""


def _read_torch(path: Path, kind: str, allow_pickle: bool) -> object:
    def load(**how: Any) -> object:
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # if it matters, an error follows
        return torch.load(path, map_location="cpu", mmap=kind == "torch", **how)

    try:
        with warnings.catch_warnings():
            check_archive(path)
            if allow_pickle:
                return load(weights_only=False)
            try:
                return load(weights_only=True)
            except Exception:  # looking at what lies beside weights takes long, and most files have nothing there
                with torch.serialization.safe_globals(stand_ins(_bystanders(path))):
                    return load(weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises nearly every type for damaged files
        if "Unsupported operand" in str(error):  # such as those of protocol 4
            form = f"'{path}' is pickled in a form that torch's safe reader does not know"
            raise UserError(f"checkpoint: {form}, {UNSAFE_HINT}") from error
        raise _damaged(path, error) from error


def _read_safetensors(path: Path) -> object:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"checkpoint: '{path}' cannot be read, it may be damaged: {one_line(error)}")


def one_line(error: Exception) -> str:
    """An exception's text without line breaks, cut to 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# ---- writing -----------------------------------------------------------------------------------------------


def in_precision(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> StateDict:
    """`state` with its floating weights in `dtype`; noise schedules and the latents' scale stay as they are."""
    return {k: v.to(dtype) if dtype is not None and _shrinkable(k, v) else v for k, v in state.items()}


def _shrinkable(key: str, value: torch.Tensor) -> bool:
    return value.is_floating_point() and not key.startswith((*COMPUTED, "scale_factor", "model_ema.decay"))


def write_tensors(
    state: Mapping[str, torch.Tensor], path: Path, kind: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to the file `path` as `safetensors`, `ckpt` (with a `state_dict` level) or `bin` (without).

    `metadata` is what a safetensors file says of itself.

    Mapped tensors go from file to file; only those that share memory or are no plain rows of numbers are copied.

    Raises:
        OSError: the file cannot be written.
    """
    state = {k: v.detach().cpu() for k, v in state.items()}
    try:
        if kind == "safetensors":
            _write_safetensors(state, path, metadata)
        else:
            _write_torch(state, path, kind)
    except (RuntimeError, SafetensorError) as error:  # what both libraries make of a full disk
        raise OSError(one_line(error)) from error


def _write_torch(state: StateDict, path: Path, kind: str) -> None:
    rows = {k: v.clone() if _is_view(v) else v for k, v in state.items()}
    torch.save({"state_dict": rows} if kind == "ckpt" else rows, path)


def _write_safetensors(state: StateDict, path: Path, metadata: Mapping[str, str] | None) -> None:
    seen: set[int] = set()
    out = {}
    for key, value in state.items():
        shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        out[key] = value.clone().contiguous() if shared else value.contiguous()
    save_file(out, path, metadata={"format": "pt", **(metadata or {})})


def _is_view(value: torch.Tensor) -> bool:
    """Whether torch.save, which writes whole storages, would write more than this tensor."""
    return value.untyped_storage().nbytes() != value.numel() * value.element_size()


def save_checkpoint(state: StateDict, path: str | os.PathLike[str], half: bool = False) -> None:
    """Write weights as .safetensors, or as .ckpt with CompVis' `state_dict` level; whole or not at all.

    Beside it goes `NAME.sha256`, for `sha256sum -c` and `verify_hash`.

    Args:
        half: weights in fp16; noise schedules and the scale factor of the latents stay in fp32.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"checkpoint: '{path}' must end in .safetensors or .ckpt")
    if path.is_dir():
        raise UserError(f"checkpoint: '{path}' is a folder; give the name of a file")
    state = in_precision(state, torch.float16) if half else state
    try:
        with atomic_path(path) as temporary:
            write_tensors(state, temporary, path.suffix[1:])
            digest = sha256_of(temporary)
            hash_file(path).unlink(missing_ok=True)  # of the file that is replaced now
        with atomic_path(hash_file(path)) as temporary:
            temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"checkpoint: '{path}' cannot be written: {one_line(error)}") from error


def hash_file(path: Path) -> Path:
    """Where the hash of `path` is kept."""
    return path.with_name(path.name + HASH_SUFFIX)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def verify_hash(path: str | os.PathLike[str]) -> bool:
    """Whether a hash was kept beside a file, which then is the file's.

    Raises:
        UserError: the file is not what was written.
    """
    kept = hash_file(Path(path))
    if not kept.is_file():
        return False
    expected = kept.read_text(encoding="utf-8").split()[:1]
    if [sha256_of(path)] != expected:
        raise UserError(f"checkpoint: '{path}' is not the file that '{kept.name}' was made for; it may be damaged")
    return True
