"""Rows `load*`: a model from its files, beside diffusers' from_pretrained.

python benchmarks/loading.py                # Stable Diffusion v1's size: 13 GB of disk
python benchmarks/loading.py --size tiny    # to see that it runs

The first load of a program, what the call itself imports and the garbage that is collected meanwhile included. Warm:
the files are in the system's memory, as after they were downloaded or read before. Cold: they are on the disk.
diffusers maps its files and has read nothing when it returns, while we have looked at every weight for damage: so the
time goes on until all weights were read. `read_cold` is the cold load beside reading the files alone, `load_again` a
second load in the same program, `load_call` such a call alone, without the reading after it. Linux only.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli

FORMATS = {"load": "pipeline", "load_safetensors": "model.safetensors", "load_ckpt": "model.ckpt"}


def ours(settings: Settings, file: str, cold: bool = False, again: bool = False, read: bool = True) -> Job:
    from ldm.loading import load_model

    def load(size: str) -> list[Any]:
        path = settings.folder / size / file
        config = None if path.is_dir() else random_model.config_of(random_model.YAML, size)
        model = load_model(config, path, settings.device)
        return [model.model, model.first_stage_model, model.cond_stage_model]

    return _job(load, settings, file, cold, again, read)


def theirs(settings: Settings, file: str, cold: bool = False, again: bool = False, read: bool = True) -> Job:
    from diffusers import StableDiffusionPipeline

    def load(size: str) -> list[Any]:
        pipe = StableDiffusionPipeline.from_pretrained(settings.folder / size / file, local_files_only=True)
        pipe.to(settings.device)
        return [pipe.unet, pipe.vae, pipe.text_encoder]

    return _job(load, settings, file, cold, again, read)


def reading(settings: Settings, file: str) -> Job:
    """The files from the disk, and nothing made of them."""
    files = _files(settings, file)
    for each in files:
        _forget(each)

    def work() -> None:
        for each in files:
            _remember(each)

    return Job(work)


def _files(settings: Settings, file: str) -> list[Path]:
    path = settings.folder / settings.size / file
    return [each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]


def _job(load: Any, settings: Settings, file: str, cold: bool, again: bool, read: bool) -> Job:
    """Load once; with `again` a tiny model was loaded before, so that what happens at the first call does not count."""
    if again:
        load("tiny")
        gc.collect()
    files = _files(settings, file)
    for each in files:
        _forget(each) if cold else _remember(each)
    kept: list[Any] = []  # the model must not be gone before its memory was looked at

    def work() -> None:
        kept[:] = load(settings.size)
        if read:
            kept.append(_checksum(kept))

    def result() -> float:
        return _checksum(load(settings.size))

    return Job(work, result, least_bytes=sum(each.stat().st_size for each in files))


def _checksum(networks: list[Any]) -> float:
    """Of all weights, so that each is read."""
    return sum(float(p.detach().sum()) for network in networks for p in network.parameters())


def _remember(file: Path) -> None:
    with open(file, "rb") as content:
        while content.read(1 << 24):
            pass


def _forget(file: Path) -> None:
    """Let the system drop its copy, so that the file is read from the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def write(settings: Settings) -> None:
    """All formats, and the tiny model that comes before a second load."""
    for size in {"tiny", settings.size}:
        random_model.write(Settings(size, settings.device, settings.folder), files=True)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""

    def row(name: str, title: str, file: str, **how: bool) -> Row:
        here = Way(f"load_model of {file}", ours, {"file": file, **how}, random_model.OURS)
        there = Way("diffusers from_pretrained", theirs, {"file": "pipeline", **how}, random_model.THEIRS)
        bars = {"bar": 0.8, "memory_bar": 1.0} if file != "model.ckpt" and not how.get("again") else {}
        rounds = 5 if how.get("cold") else 3  # disks are noisy
        shared = {"fresh": True, "warm_up": False, "rounds": rounds, "tolerance": 1e-5, "prepare": write}
        return Row(name, title, here, there, **bars, **shared)

    warm = [row(name, f"loading, {file}, warm, every weight read", file) for name, file in FORMATS.items()]
    cold = row("load_cold", "loading, pipeline, cold, every weight read", "pipeline", cold=True)
    alone = Way("reading the files alone", reading, {"file": "pipeline"})
    return [
        *warm,
        cold,
        replace(cold, name="read_cold", title="the same", theirs=alone, bar=None, memory_bar=None, tolerance=None),
        row("load_again", "loading, pipeline, warm, once more in the same program", "pipeline", again=True),
        row("load_call", "the same, the call alone", "pipeline", again=True, read=False),
    ]


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
