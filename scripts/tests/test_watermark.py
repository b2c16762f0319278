"""Say which pictures carry Stable Diffusion's invisible watermark: exit code 0 when all do, 1 when one does not.

python scripts/tests/test_watermark.py outputs/txt2img-samples/samples/*.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm import cli, cli_checks


def main(argv: Sequence[str]) -> None:
    """Decode every picture and print one line each."""
    parser = cli.ArgumentParser(description="Say which pictures carry Stable Diffusion's invisible watermark.")
    parser.add_argument("images", nargs="+", help="pictures to look into")
    options = parser.parse_args(argv)

    from ldm import watermark

    marked = []
    for path in options.images:
        image = cli_checks.read_image(path, "images")
        found = watermark.find(image) if watermark.fits(image) else None
        marked.append(found is not None)
        print(f"{path}: {found or ('no watermark' if watermark.fits(image) else 'too small for a watermark')}")
    if not all(marked):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
