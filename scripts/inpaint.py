"""Redraw a part of an image, led by a prompt; every pixel outside the mask stays as it is.

python scripts/inpaint.py --prompt "a red hat" --init-img photo.png --mask mask.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli, cli_sampling


def main(argv: Sequence[str]) -> None:
    """Parse the flags and draw."""
    parser = cli_sampling.sampling_parser(
        "Redraw an image where a mask is white, led by a prompt, with a model that was trained for it or any other.",
        outdir="outputs/inpaint-samples",
        n_samples=2,
        n_iter=1,
        scale=7.5,
        image=True,
        mask=True,
        strength=1.0,
    )
    cli_sampling.sample(parser.parse_args(argv), "scripts/inpaint.py")


if __name__ == "__main__":
    cli.run(main)
