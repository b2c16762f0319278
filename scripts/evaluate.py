"""Measure how well a model follows the tiny world's prompts.

python scripts/evaluate.py                  200 captions whose shape-colour pairs the tiny model never saw
python scripts/evaluate.py --reader-check   the reader itself, on true pictures and on shuffled captions
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Measure how well a model follows the tiny world's prompts.")
    flag = parser.add_argument
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--adapter_path", help="directory of adapters to put into the model")
    flag("--adapter_scale", type=float, default=1.0, help="strength of the adapters")
    flag("--n", type=int, default=200, help="number of captions, one picture each")
    flag("--split", choices=["test", "train"], default="test",
         help="test: only shape-colour pairs that training never shows; train: only the others")  # fmt: skip
    flag("--sampler", choices=["plms", "ddim", "dpm_solver"], default="plms", help="how to sample")
    flag("--ddim_steps", type=int, default=50, help="number of sampling steps, whatever the sampler")
    flag("--scale", type=float, default=3.0, help="guidance scale; 1 for none")
    flag("--seed", type=int, default=0, help="seed of the captions and of the first picture")
    flag("--batch_size", type=int, default=50, help="pictures at a time")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--outdir", default="outputs/evaluation", help="where accuracy.json and pictures.png are written")
    flag("--reader-check", action="store_true", help="only report the reader on true pictures; no model")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and paths that cannot be."""
    for name in ("n", "ddim_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if not 0 <= options.seed < 2**32 - options.n:
        raise UserError(f"--seed {options.seed}: must be at least 0 and below 2**32 - n")
    for name in ("config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")
    if options.adapter_path and not Path(options.adapter_path).is_dir():
        raise UserError(f"--adapter_path: there is no directory '{options.adapter_path}'")
    if Path(options.outdir).exists() and not Path(options.outdir).is_dir():
        raise UserError(f"--outdir: '{options.outdir}' is a file, not a directory")


def measure(options: argparse.Namespace) -> None:
    """Draw, judge, print the table and write the files."""
    from ldm.evaluation.prompt_following import accuracy_of, evaluate, labelled_grid, table
    from ldm.inference import load_model, txt2img
    from ldm.modules.pictures import save_picture
    from ldm.util import atomic_path

    model = load_model(
        options.config,
        options.ckpt,
        options.device,
        adapter_path=options.adapter_path,
        adapter_scale=options.adapter_scale,
    )
    sampling = {
        "steps": options.ddim_steps,
        "sampler": options.sampler,
        "scale": options.scale,
        "batch_size": options.batch_size,
        "exact": False,
    }

    def draw(captions: list[str], seeds: list[int]) -> list[Any]:
        return [picture.image for picture in txt2img(model, captions, seeds=seeds, **sampling)]

    start = time.perf_counter()
    judgements = evaluate(draw, options.n, options.split, options.seed)
    seconds = time.perf_counter() - start
    accuracy = accuracy_of(judgements)
    report = {
        "accuracy": accuracy,
        "settings": {key: value for key, value in vars(options).items() if key not in ("traceback", "outdir")},
        "seconds": round(seconds, 1),
        "pictures": [judgement.record() for judgement in judgements],
    }
    outdir = Path(options.outdir)
    with atomic_path(outdir / "accuracy.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_picture(labelled_grid(judgements), outdir / "pictures.png")
    pairs = "never seen in training" if options.split == "test" else "seen in training"
    print(f"{options.n} captions with shape-colour pairs {pairs}, {seconds:.0f} s")
    print(table({"accuracy": accuracy}))
    print(f"Numbers: {outdir / 'accuracy.json'}   pictures: {outdir / 'pictures.png'}")


def main(argv: Sequence[str]) -> None:
    """Measure the model, or with --reader-check the reader."""
    options = parser().parse_args(argv)
    if options.reader_check:
        from ldm.evaluation.prompt_following import check_reader, table

        print(table(check_reader()))
        return
    check(options)
    measure(options)


if __name__ == "__main__":
    cli.run(main)
