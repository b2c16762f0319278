"""Write the weights of a checkpoint anew: .ckpt, .safetensors or a diffusers folder, from any of them.

python scripts/convert.py logs/RUN/checkpoints/last.ckpt model.safetensors --half
python scripts/convert.py model.safetensors model-for-diffusers --config model.yaml
python scripts/convert.py model-for-diffusers model.ckpt
python scripts/convert.py model.safetensors few-steps.safetensors --lora lora.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli, hub
from ldm.cli_checks import read_loras
from ldm.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Write the weights of a checkpoint anew: averaged, smaller, elsewhere.")
    parser.add_argument(
        "source", help="a .ckpt or .safetensors file, or a folder that diffusers wrote, or a hub's owner/name"
    )
    parser.add_argument("target", help="what to write: *.ckpt, *.safetensors, or the name of a diffusers folder")
    parser.add_argument(
        "--config", help="the model's yaml, to make a folder of a file; else the .yaml beside, or that of its shapes"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--half", action="store_true", help="16-bit weights (noise schedules stay 32-bit)")
    precision.add_argument("--full", action="store_true", help="32-bit weights")
    averages = parser.add_mutually_exclusive_group()
    averages.add_argument("--no_ema", action="store_true", help="the plain weights instead of the averaged ones")
    averages.add_argument("--keep_ema", action="store_true", help="both sets of weights, as in training")
    parser.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]",
                        help="add a LoRA to the weights, with its strength (1); may be given often")  # fmt: skip
    parser.add_argument("--bin", action="store_true", help="pickled .bin files in a folder, instead of safetensors")
    parser.add_argument("--allow_pickle", action="store_true", help="unpickle any .ckpt: it may run any code")
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse the flags, read, write."""
    options = parser().parse_args(argv)

    source, target = hub.find_checkpoint(options.source), Path(options.target)
    if not source.exists():
        raise UserError(f"checkpoint: there is no file '{source}'")
    loras = read_loras(options.lora)

    import torch

    from ldm.exchange.convert import Conversion

    convert = Conversion(
        dtype=torch.float16 if options.half else torch.float32 if options.full else None,
        ema="plain" if options.no_ema else "both" if options.keep_ema else "average",
        config=Path(options.config) if options.config else None,
        as_bin=options.bin,
        loras=loras,
        allow_pickle=options.allow_pickle,
    )
    for line in convert(source, target):
        print(line)
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    print(f"{target}: {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
