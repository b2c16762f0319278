"""Bring k-diffusion's configs and checkpoints here, or strip a trained model to what sampling needs.

python scripts/convert_karras.py config.json run.yaml                        # then: main.py --base run.yaml -t
python scripts/convert_karras.py model_00200000.pth model.ckpt --config config.json       # to train on from
python scripts/convert_karras.py logs/RUN/checkpoints/last.ckpt model.safetensors --half  # to sample from
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="k-diffusion's files as ours; and models of either, for sampling alone.")
    parser.add_argument("source", help="k-diffusion's .json, .pth or .safetensors, or a .ckpt of a run of ours")
    parser.add_argument("target", help="what to write: *.yaml, *.ckpt to train on from, *.safetensors to sample from")
    parser.add_argument("--config", help="the .json (of ours, the .yaml) of a checkpoint that does not bring it")
    parser.add_argument("--half", action="store_true", help="16-bit weights, to sample from")
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse the flags, read, write."""
    options = parser().parse_args(argv)
    for flag, name in (("source", options.source), ("--config", options.config)):
        if name and not Path(name).is_file():
            raise UserError(f"{flag}: there is no file '{name}'")
    if options.half and not options.target.endswith(".safetensors"):
        raise UserError("--half: is for a .safetensors to sample from; training goes on from whole weights")

    import torch

    from ldm.k_diffusion.convert import convert

    config = Path(options.config) if options.config else None
    for line in convert(Path(options.source), Path(options.target), config, torch.float16 if options.half else None):
        print(line)


if __name__ == "__main__":
    cli.run(main)
