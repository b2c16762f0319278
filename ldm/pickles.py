"""What a torch pickle would import, found by reading its opcodes: nothing in the file is run."""

from __future__ import annotations

import _compat_pickle
import io
import os
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import UserError

UNSAFE_HINT = (
    "which could run any code, so it is refused; get the weights as .safetensors, "
    "or, if you trust its author, rewrite it with scripts/convert.py --allow_pickle"
)
# Objects that trainers leave beside the weights. They are read as empty stand-ins and never imported.
BYSTANDERS = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "argparse.Namespace",
    "typing.Any",
    "pathlib.",
    "main.",
    "ldm.",
)
BYSTANDER_DICTS = ("collections.defaultdict",)
BYSTANDER_NUMBERS = (
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
LARGEST_PICKLE = 256 * 2**20  # bytes; the weights lie beside it, not in it
BUILTINS = {f"builtins.{kind.__name__}": kind for kind in (dict, list, set, int, float, tuple, str, bool)}


class StandIn:
    """Takes the place of a pickled object that nobody needs: swallows its arguments and its state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def empty_dict(*args: Any) -> dict:
    """Stands in for dictionary types."""
    return {}


def foreign_names(path: str | os.PathLike[str]) -> list[str]:
    """Dotted names that the pickle in a torch file imports beyond those that torch itself deems safe, sorted.

    Raises:
        UserError: the file's pickle is damaged.
    """
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed, names = _get_allowed_globals(), set()
    try:
        for name in _names_in_file(Path(path)):
            if name not in allowed:
                names.add(name)
    except Exception as error:  # damage may show as nearly any type
        if not refused_names(names):  # which is the better reason to refuse it
            raise _damaged(path, error) from error
    return sorted(names)


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise UserError when a torch file's zip archive is none that torch writes; only its directory is read."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _pickles_in(archive)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return UserError(f"checkpoint: '{path}' is damaged or cut short: {reason}")


def _pickles_in(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
    if not members:
        raise ValueError("this zip file has no data.pkl")
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > LARGEST_PICKLE for m in members):
        raise ValueError("its data.pkl is compressed or huge, which torch never writes")
    return members


def _names_in_file(path: Path) -> Iterator[str]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise ValueError("its end is missing")
            file.seek(0)
            for _ in range(5):  # magic number, protocol, system, the object, its storages' keys
                yield from _names_in_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        for member in _pickles_in(archive):
            yield from _names_in_pickle(io.BytesIO(archive.read(member)))


def _names_in_pickle(file: BinaryIO) -> Iterator[str]:
    last: list[str | None] = [None, None]  # on the stack; what is no string is of no interest
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield ".".join(_modern(*argument.split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(_modern(*last)) if None not in last else "an object under a computed name"
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = last[1]
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            last = [last[1], memo.get(argument)]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last[1]
        else:
            last = [last[1], argument if isinstance(argument, str) and opcode.name != "GLOBAL" else None]


def _modern(module: str, name: str) -> tuple[str, str]:
    """Python 3's place of what Python 2's pickles call by another name, as torch's reader takes it."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _compat_pickle.NAME_MAPPING[module, name]
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def refused_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that are not known to be harmless bystanders of the weights."""
    known = (*BYSTANDER_DICTS, *BYSTANDER_NUMBERS)
    return [name for name in names if not name.startswith(BYSTANDERS) and name not in known and name not in BUILTINS]


def stand_ins(names: Iterable[str]) -> list[tuple[Any, str]]:
    """(stand-in, dotted name) pairs for `torch.serialization.safe_globals`."""
    harmless = {**BUILTINS, **dict.fromkeys(BYSTANDER_DICTS, empty_dict)}
    return [(harmless.get(name, StandIn), name) for name in names]
