"""Programs of the repository as processes of their own: as a user starts them, or begun with everything imported."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.kill import starter, wait

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300
NOWHERE = (Path(os.devnull), Path(os.devnull))

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run(*words: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS` as a user runs it, in `cwd` and with these environment variables besides."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS)


def run_warm(*words: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """`run` without the seconds that imports take: a process forked from one that has torch and ldm, but ran nothing.

    All else is as in `run`. For programs that load a model; not for tests of what is imported, or of how long it takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        (code,) = wait([start_warm(*words, cwd=cwd, said=said, **variables)], SECONDS)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in said)
    if code is None:
        raise subprocess.TimeoutExpired(list(words), SECONDS, stdout, stderr)
    return subprocess.CompletedProcess(list(words), code, stdout, stderr)


def start_warm(*words: object, cwd: Path = ROOT, said: Sequence[Path] = NOWHERE, **variables: str) -> BaseProcess:
    """`run_warm` that does not wait; stdout and stderr go into the files `said`."""
    process = starter().Process(target=_be, args=([*map(str, words)], {**os.environ, **variables}, cwd, said))
    process.start()
    return process


def _be(words: list[str], environment: Mapping[str, str], cwd: Path, said: Sequence[Path]) -> None:
    """Turn this process into `python WORDS`."""
    import ldm

    assert Path(ldm.__file__).is_relative_to(ROOT), f"{ldm.__file__} was imported: begin the tests in {ROOT}"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in enumerate(said, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # the default again, for the program's own processes
    sys.argv = list(words)
    sys.path = [str(Path(words[0]).resolve().parent), *(path for path in sys.path if path not in ("", str(ROOT)))]
    runpy.run_path(words[0], run_name="__main__")
