"""Make variations of an image, led by a prompt.

python scripts/img2img.py --prompt "A fantasy landscape" --init-img sketch.jpg --strength 0.8
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
        "Make variations of an image, led by a prompt.",
        outdir="outputs/img2img-samples",
        n_samples=2,
        n_iter=1,
        scale=5.0,
        image=True,
    )
    cli_sampling.sample(parser.parse_args(argv), "scripts/img2img.py")


if __name__ == "__main__":
    cli.run(main)
