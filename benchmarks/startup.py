"""Row `help`: from the command to its first line of help, beside the import of diffusers alone.

python benchmarks/startup.py
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli

HELP = (str(random_model.ROOT / "scripts" / "txt2img.py"), "--help")
IMPORT = ("-c", "import diffusers; print(diffusers.__version__)")


def program(settings: Settings, words: tuple[str, ...]) -> Job:
    """A Python program until its first line."""

    def measure() -> tuple[float, float]:
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
        return seconds, math.nan

    return Job(lambda: None, measure=measure)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""
    ours, theirs = (
        Way("txt2img.py --help", program, {"words": HELP}),
        Way("import diffusers", program, {"words": IMPORT}),
    )
    return [Row("help", "first line of help", ours, theirs, bar=0.3, tolerance=None)]


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
