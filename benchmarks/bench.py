"""The whole table: us and the peers on the same weights and inputs, by turns, in one run (`make bench`).

python benchmarks/bench.py                            # on a CPU, at Stable Diffusion v1's size: 24 GiB of memory
python benchmarks/bench.py --rows unet encode         # only these
python benchmarks/bench.py --size tiny --rounds 2     # to see that it runs
python benchmarks/bench.py --device cuda              # on a GPU, in bf16

benchmarks/README.md says what each row is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    autoencoder,
    loading,
    noise_assignment,
    sampler_overhead,
    startup,
    text_to_image,
    training_step,
    unet,
)
from benchmarks.command import run_rows
from benchmarks.side_by_side import Row, Settings
from ldm import cli

PARTS = (unet, text_to_image, autoencoder, training_step, loading, noise_assignment, startup, sampler_overhead)


def rows(settings: Settings) -> list[Row]:
    """The rows of all files."""
    return [row for part in PARTS for row in part.rows(settings)]


def main(argv: Sequence[str]) -> None:
    """Measure the rows that the flags name, or all."""
    run_rows(rows, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)
