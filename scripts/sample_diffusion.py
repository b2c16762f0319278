"""Draw with a model that no prompt leads: unconditional, by class, or by an image (super-resolution, segmentation).

python scripts/sample_diffusion.py -r models/ldm/celeba256 -n 8 --batch_size 4 -c 200 -e 0.0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli, cli_unprompted


def main(argv: Sequence[str]) -> None:
    """Parse the flags and draw."""
    cli_unprompted.sample(cli_unprompted.parser().parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
