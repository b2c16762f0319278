"""Write the weights of a checkpoint anew: .ckpt, .safetensors or a diffusers folder, from any of them.

python scripts/convert.py logs/RUN/checkpoints/last.ckpt model.safetensors --half
python scripts/convert.py model.safetensors model-for-diffusers --config model.yaml
python scripts/convert.py model-for-diffusers model.ckpt
python scripts/convert.py model.safetensors few-steps.safetensors --lora lora.safetensors
python scripts/convert.py lora.safetensors for-the-web-ui.safetensors --lora_format kohya
python scripts/convert.py toy-embedding.safetensors toy.pt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli, hub
from ldm.cli_checks import SD_CONFIG, read_artefacts
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
    parser.add_argument("--adapter", "--lora", action="append", metavar="FILE[:STRENGTH]",
                        help="add a LoRA, or weights that a personalisation left, to the weights, with its strength "
                        "(1); may be given often")  # fmt: skip
    parser.add_argument("--lora_format", choices=["diffusers", "kohya"],
                        help="write the source, a LoRA of SD v1 or of --config, in this format")  # fmt: skip
    parser.add_argument("--bin", action="store_true", help="pickled .bin files in a folder, instead of safetensors")
    parser.add_argument("--allow_pickle", action="store_true", help="unpickle any .ckpt: it may run any code")
    return parser


def is_small(source: Path) -> bool:
    """Whether a file may be an embedding: a few vectors."""
    return source.is_file() and source.stat().st_size < 2**24


def convert_artefact(options: argparse.Namespace, source: Path, target: Path) -> bool:
    """Write a LoRA in --lora_format, or an embedding under its new name's kind; whether the source was one."""
    from ldm.exchange import embeddings, lora
    from ldm.util import load_yaml
    from ldm.weight_files import read_content

    if source.resolve() == target.resolve():
        raise UserError(f"convert: '{source}' is both the source and the target")
    if options.lora_format:
        lora.convert(source, target, load_yaml(options.config or SD_CONFIG), options.lora_format)
        return True
    words = embeddings.words_in(read_content(source, options.allow_pickle), source.stem)
    if words:
        embeddings.write(words, target, lora.read_metadata(source))
    return bool(words)


def main(argv: Sequence[str]) -> None:
    """Parse the flags, read, write."""
    options = parser().parse_args(argv)

    source, target = hub.find_checkpoint(options.source), Path(options.target)
    if not source.exists():
        raise UserError(f"checkpoint: there is no file '{source}'")
    artefacts = read_artefacts(options)
    if options.lora_format or (target.suffix in (".pt", ".safetensors") and is_small(source)):
        if convert_artefact(options, source, target):
            print(f"{target}: {target.stat().st_size / 2**10:.1f} KiB")
            return

    import torch

    from ldm.exchange.convert import Conversion

    convert = Conversion(
        dtype=torch.float16 if options.half else torch.float32 if options.full else None,
        ema="plain" if options.no_ema else "both" if options.keep_ema else "average",
        config=Path(options.config) if options.config else None,
        as_bin=options.bin,
        artefacts=artefacts,
        allow_pickle=options.allow_pickle,
    )
    for line in convert(source, target):
        print(line)
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    print(f"{target}: {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
