"""Malicious and broken checkpoints: each ends in one line that names the file, and nothing in it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm import checkpoint
from ldm.errors import UserError
from ldm.weight_files import write_tensors

STATE = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}


class RunsCode:
    """Pickles as a call that would leave a folder behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def torch_bytes(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def with_pickle(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file with this pickle in the place of its own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_bytes(STATE))) as source, zipfile.ZipFile(buffer, "w") as target:
        for item in source.infolist():
            pickle_here = item.filename.endswith("data.pkl")
            target.writestr(item.filename, pickled if pickle_here else source.read(item), compression)
    return buffer.getvalue()


def hidden_name(trace: Path) -> bytes:
    """A pickle that calls os.mkdir under a name that a harmless one stands before in the file."""
    word = str(trace).encode()

    def short(text: bytes) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text

    remember = (
        short(b"os") + pickle.BINPUT + b"\x00" + pickle.POP + short(b"mkdir") + pickle.BINPUT + b"\x01" + pickle.POP
    )
    decoy = short(b"omegaconf.a") + pickle.POP + short(b"b") + pickle.POP
    call = pickle.BINGET + b"\x00" + pickle.BINGET + b"\x01" + pickle.STACK_GLOBAL
    return b"\x80\x04" + remember + decoy + call + short(word) + pickle.TUPLE1 + pickle.REDUCE + b"."


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def tensors(kind: str, **changes: torch.Tensor) -> Callable[[Path, Path], None]:
    return lambda file, trace: write_tensors(STATE | changes, file, kind)


def data(make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda file, trace: file.write_bytes(make(trace))


NAN, INF = (torch.full((3,), float(word)) for word in ("nan", "inf"))
FP8 = torch.ones(3, 2).to(torch.float8_e4m3fn)
HEADER = {"weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}
WRONG_OFFSETS = {"weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 2400]}}
# What is wrong: how such a file is made, and what its message must say.
BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "runs code": (
        data(lambda trace: torch_bytes({"state_dict": STATE, "x": RunsCode(trace)})),
        r"pickles \w+\.mkdir.*refused",
    ),
    "runs code, old format": (
        data(lambda trace: torch_bytes({"x": RunsCode(trace)}, _use_new_zipfile_serialization=False)),
        r"pickles \w+\.mkdir.*refused",
    ),
    "runs code, bare pickle": (data(lambda trace: pickle.dumps(RunsCode(trace), 2)), r"pickles \w+\.mkdir.*refused"),
    "runs code, hidden name": (data(lambda trace: with_pickle(hidden_name(trace))), r"pickles os\.mkdir.*refused"),
    "cut short": (data(lambda trace: torch_bytes(STATE)[:-200]), "damaged or cut short"),
    "cut short, old format": (
        data(lambda trace: torch_bytes(STATE, _use_new_zipfile_serialization=False)[:-10]),
        "damaged",
    ),
    "cut short, safetensors": (data(lambda trace: safetensors_bytes(HEADER, bytes(20))), "may be damaged"),
    "other shapes": (tensors("ckpt", weight=torch.ones(2, 3)), r"misshapen: weight .* is \[2, 3\] .* and \[3, 2\]"),
    "empty": (data(lambda trace: b""), "is empty"),
    "a directory": (lambda file, trace: file.mkdir(), "is a folder"),
    "a text": (data(lambda trace: b"404: Not Found"), "neither a .ckpt nor a .safetensors"),
    "a web page": (data(lambda trace: b"<!doctype html><html>" * 9), "neither a .ckpt nor a .safetensors"),
    "a pointer": (data(lambda trace: b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "not a number": (tensors("ckpt", bias=NAN), r"no finite numbers \(1 in bias\)"),
    "infinite": (tensors("safetensors", bias=INF), "no finite numbers"),
    "8-bit floats": (tensors("safetensors", weight=FP8), "float8_e4m3fn weights.*16- or 32-bit"),
    "8-bit integers": (tensors("ckpt", weight=torch.ones(3, 2, dtype=torch.int8)), "int8 weights"),
    "tensors lie deeper": (
        data(lambda trace: torch_bytes({"module": {"net": STATE}})),
        "under 'module.net': 2 tensors",
    ),
    "no tensors": (data(lambda trace: torch_bytes({"epoch": 3})), "no tensors by name"),
    "a list": (data(lambda trace: torch_bytes([torch.ones(2)])), "no tensors by name"),
    "a form that the safe reader lacks": (
        data(lambda trace: torch_bytes(STATE, pickle_protocol=4)),
        "safe reader.*refused",
    ),
    "nested a hundred thousand times": (data(lambda trace: with_pickle(nested(10**5))), "no tensors by name|damaged"),
    "huge header": (data(lambda trace: safetensors_bytes(HEADER, bytes(24), 2**62)), "header claims 4,611,686"),
    "wrong offsets": (data(lambda trace: safetensors_bytes(WRONG_OFFSETS, bytes(24))), "may be damaged"),
    "no header": (data(lambda trace: safetensors_bytes("{", bytes(24))[:8] + b"{" + bytes(60)), "damaged"),
    "packed": (data(lambda trace: with_pickle(bytes(10**6), zipfile.ZIP_DEFLATED)), "compressed or huge"),
    "another zip": (data(lambda trace: torch_bytes(STATE).replace(b"data.pkl", b"text.txt")), "no data.pkl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_it_ends_in_one_line_and_runs_nothing(name: str, tmp_path: Path) -> None:
    make, message = BROKEN[name]
    file, trace = tmp_path / "model.ckpt", tmp_path / "trace"
    make(file, trace)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load_into(nn.Linear(2, 3), file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not trace.exists()
