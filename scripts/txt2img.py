"""Draw pictures from a prompt.

python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse" --plms
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
        "Draw pictures from a prompt.", outdir="outputs/txt2img-samples", n_samples=3, n_iter=2, scale=7.5
    )
    cli_sampling.sample(parser.parse_args(argv), "scripts/txt2img.py")


if __name__ == "__main__":
    cli.run(main)
