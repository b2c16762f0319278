"""Measure how well a model follows the tiny world's prompts, or score pictures that are there: FID, KID, CLIP score.

python scripts/evaluate.py                  200 captions whose shape-colour pairs the tiny model never saw
python scripts/evaluate.py --reader-check   the reader itself, on true pictures and on shuffled captions
python scripts/evaluate.py --pictures outputs/generated --reference photos              FID and KID of two folders
python scripts/evaluate.py --pictures outputs/generated --reference statistics.npz      FID by known mu and sigma
python scripts/evaluate.py --pictures outputs/generated --clip openai/clip-vit-large-patch14
python scripts/evaluate.py --pictures outputs/generated --reference tiny-world          by the tiny world's features
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
from ldm.cli_checks import read_artefacts
from ldm.cli_sampling import add_artefact_flags
from ldm.errors import UserError
from ldm.samplers import SAMPLERS, SCHEDULES, check_choice


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(
        description="Measure how well a model follows the tiny world's prompts; with --pictures, score pictures that "
        "are there, by FID, KID, CLIP score and the tiny world's reader."
    )
    flag = parser.add_argument
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--adapter_path", help="directory of adapters to put into the model")
    flag("--adapter_scale", type=float, default=1.0, help="strength of the adapters")
    add_artefact_flags(flag)
    flag("--n", type=int, default=200, help="number of captions, one picture each")
    flag("--split", choices=["test", "train"], default="test",
         help="test: only shape-colour pairs that training never shows; train: only the others")  # fmt: skip
    flag("--sampler", choices=list(SAMPLERS), default="plms", help="how to sample")
    flag(
        "--schedule", choices=list(SCHEDULES), help="levels of noise of k-diffusion's samplers; uniform when not given"
    )
    flag("--ddim_steps", type=int, default=50, help="number of sampling steps, whatever the sampler")
    flag("--scale", type=float, default=3.0, help="guidance scale; 1 for none")
    flag("--seed", type=int, default=0, help="seed of the captions and of the first picture")
    flag("--batch_size", type=int, default=50, help="pictures at a time, of the model and of the feature net")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--outdir", default="outputs/evaluation",
         help="where accuracy.json and pictures.png are written, or scores.json")  # fmt: skip
    flag("--reader-check", action="store_true", help="only report the reader on true pictures; no model")
    flag = parser.add_argument_group(
        "pictures that are there", "no model draws; scores go to OUTDIR/scores.json"
    ).add_argument
    flag("--pictures", help="folder, with its sub-folders; captions come from its manifest.jsonl or a .txt beside each")
    flag("--reference", help="what FID and KID compare with: a folder, a .npz with mu and sigma (FID alone), or "
         "tiny-world, for scenes drawn anew")  # fmt: skip
    flag("--features", choices=["auto", "inception", "tiny"], default="auto",
         help="the net that looks at pictures; auto is Inception where its weights are, else the tiny world's own; "
         "scores are named after it")  # fmt: skip
    flag(
        "--inception",
        metavar="FILE",
        help="Inception's weights, pytorch-fid's file (default: where torch keeps downloads)",
    )
    flag("--statistics", metavar="FILE.npz", help="write mu and sigma of --pictures, a reference for later")
    flag(
        "--clip", metavar="MODEL", help="CLIP for the CLIP score, a folder in transformers' form or a hub's owner/name"
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and paths that cannot be."""
    for name in ("n", "ddim_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if not 0 <= options.seed < 2**32 - options.n:
        raise UserError(f"--seed {options.seed}: must be at least 0 and below 2**32 - n")
    if Path(options.outdir).exists() and not Path(options.outdir).is_dir():
        raise UserError(f"--outdir: '{options.outdir}' is a file, not a directory")
    if options.pictures is not None:
        return check_pictures(options)
    for name in ("reference", "statistics", "clip"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: scores pictures that are there; name their folder with --pictures")
    check_choice(options.sampler, options.schedule, None, {}, lambda name: f"--{name}")
    for name in ("config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")
    if options.adapter_path and not Path(options.adapter_path).is_dir():
        raise UserError(f"--adapter_path: there is no directory '{options.adapter_path}'")
    read_artefacts(options)


def check_pictures(options: argparse.Namespace) -> None:
    """Raise UserError for what --pictures and its flags cannot be."""
    if not Path(options.pictures).is_dir():
        raise UserError(f"--pictures: there is no folder '{options.pictures}'")
    reference = options.reference
    if reference is not None and reference != "tiny-world":
        if not (Path(reference).is_file() if reference.endswith(".npz") else Path(reference).is_dir()):
            raise UserError(f"--reference: there is no folder or .npz file '{reference}', nor is it tiny-world")
    if options.inception is not None and not Path(options.inception).is_file():
        raise UserError(f"--inception: there is no file '{options.inception}'")
    if options.inception is not None and options.features == "tiny":
        raise UserError("--inception: goes with --features inception or auto, not tiny")
    if options.statistics is not None and not options.statistics.endswith(".npz"):
        raise UserError(f"--statistics '{options.statistics}': must end in .npz")


def score_pictures(options: argparse.Namespace) -> None:
    """Score a folder of pictures, print the table and write scores.json."""
    from ldm.evaluation import clip_score, quality
    from ldm.evaluation.distances import Statistics
    from ldm.util import pick_device

    device = pick_device(options.device)
    paths = quality.pictures_in(options.pictures)
    captions = quality.captions_of(options.pictures, paths)
    if options.clip and captions is None:
        raise UserError(f"--clip: '{options.pictures}' has neither manifest.jsonl nor .txt files with captions")
    if captions is None and not (options.reference or options.statistics):
        raise UserError("--pictures: nothing to score; add --reference, --statistics or, with captions, --clip")
    score = clip_score.load(options.clip, device) if options.clip else None
    scores: dict[str, float] = {}
    if options.reference or options.statistics:
        tiny = options.reference == quality.TINY_WORLD and options.features == "auto"
        features = quality.FeatureNet.pick("tiny" if tiny else options.features, options.inception, device)
        reference = (
            quality.Reference.read(options.reference, features, options.batch_size) if options.reference else None
        )
        found = features.of_files(paths, options.batch_size)
        if options.statistics:
            Statistics.of(found).save(options.statistics)
        if reference is not None:
            scores |= quality.distances(found, reference, features.name)
            if reference.features is None:
                print("KID is left out: it needs the reference's pictures, not mu and sigma alone")
            if len(found) <= found.shape[1]:
                print(f"warning: {len(found)} pictures for {found.shape[1]} features: FID is far too high; take more")
    if score is not None:
        scores["CLIP score"] = quality.mean_clip_score(score, paths, captions, options.batch_size)
    if captions is not None:
        scores |= quality.reader_accuracy(paths, captions)
    report = {"scores": scores, "pictures": len(paths), "settings": settings_of(options)}
    write_report(report, Path(options.outdir) / "scores.json")
    print(f"{len(paths)} pictures of {options.pictures}")
    print("\n".join(f"{name:<48}{value:>12.4f}" for name, value in scores.items()))
    print(f"Numbers: {Path(options.outdir) / 'scores.json'}")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The flags, for a report."""
    return {key: value for key, value in vars(options).items() if key not in ("traceback", "outdir")}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write JSON, whole or not at all."""
    from ldm.util import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    """Draw, judge, print the table and write the files."""
    from ldm.evaluation.prompt_following import accuracy_of, evaluate, labelled_grid, table
    from ldm.inference import load_model, txt2img
    from ldm.modules.pictures import save_picture

    model = load_model(
        options.config,
        options.ckpt,
        options.device,
        adapter_path=options.adapter_path,
        adapter_scale=options.adapter_scale,
        artefacts=read_artefacts(options),
    )
    sampling = {
        "steps": options.ddim_steps,
        "sampler": options.sampler,
        "schedule": options.schedule,
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
        "settings": settings_of(options),
        "seconds": round(seconds, 1),
        "pictures": [judgement.record() for judgement in judgements],
    }
    outdir = Path(options.outdir)
    write_report(report, outdir / "accuracy.json")
    save_picture(labelled_grid(judgements), outdir / "pictures.png")
    pairs = "never seen in training" if options.split == "test" else "seen in training"
    print(f"{options.n} captions with shape-colour pairs {pairs}, {seconds:.0f} s")
    print(table({"accuracy": accuracy}))
    print(f"Numbers: {outdir / 'accuracy.json'}   pictures: {outdir / 'pictures.png'}")


def main(argv: Sequence[str]) -> None:
    """Measure the model, or with --reader-check the reader, or with --pictures what is there."""
    options = parser().parse_args(argv)
    if options.reader_check:
        from ldm.evaluation.prompt_following import check_reader, table

        print(table(check_reader()))
        return
    check(options)
    if options.pictures is not None:
        score_pictures(options)
    else:
        measure(options)


if __name__ == "__main__":
    cli.run(main)
