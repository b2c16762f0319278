"""Does immiscible noise train faster? Vanilla, assignment and KNN at equal steps on the tiny world, three seeds each.

python scripts/noise_study.py              about two hours on 4 cores; stopped and started again, it goes on run by run

Every run trains the small U-Net of configs/tiny/noise_study.yaml from scratch and measures it on the way: FID and KID
by the tiny world's feature net, and the share of pictures that the reader finds right in everything. The output
folder gets one JSON a run, table.md and curve.png. A run is made anew when anything that it depends on has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("vanilla", "assignment", "knn")
# What a run's numbers depend on beside its settings.
FILES = (
    "models/tiny/model.safetensors", "models/tiny/features.safetensors",
    *(f"ldm/{name}.py" for name in (
        "modules/noise", "modules/randomness", "modules/ema", "modules/diffusionmodules/openaimodel",
        "models/diffusion/trainer", "models/diffusion/base", "models/diffusion/ddpm", "models/diffusion/schedule",
        "models/diffusion/sampling",
        "models/diffusion/dpm_solver/solver", "models/diffusion/dpm_solver/sampler", "data/shapes", "drawing",
        "evaluation/noise_study", "evaluation/distances", "evaluation/scene_features", "evaluation/shapes",
    )),
)  # fmt: skip


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Train with three kinds of noise at equal steps, and draw the curves.")
    flag = parser.add_argument
    flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="kinds of noise")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, order, noise; each with every method")
    flag("--steps", type=int, default=1200, help="training steps of every run")
    flag("--batch_size", type=int, default=128, help="samples a step, among which noise is assigned")
    flag("--k", type=int, default=16, help="KNN's draws a sample")
    flag("--learning_rate", type=float, default=2e-3, help="constant")
    flag("--scenes", type=int, default=12000, help="pictures of the training set")
    flag("--measurements", type=int, default=6, help="points of the curve")
    flag("--pictures", type=int, default=500, help="drawn at each of them")
    flag("--sampling_steps", type=int, default=10, help="of DPM-Solver++, a picture")
    flag("--scale", type=float, default=2.0, help="guidance scale of the pictures; 1 for none")
    flag("--config", default="configs/tiny/noise_study.yaml", help="yaml of the model")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--outdir", default="outputs/noise_study", help="where runs, table and curves are kept")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    for name in ("steps", "batch_size", "k", "measurements", "sampling_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.pictures < 2:
        raise UserError(f"--pictures {options.pictures}: a distance needs at least 2")
    if options.scenes < options.batch_size:
        raise UserError(f"--scenes {options.scenes}: must be at least --batch_size {options.batch_size}")
    if not 0 < options.learning_rate < 1:
        raise UserError(f"--learning_rate {options.learning_rate:g}: must lie between 0 and 1")
    if not Path(options.config).is_file():
        raise UserError(f"--config: there is no file '{options.config}'")


def key_of(recipe: dict[str, Any], method: str, **machine: str) -> str:
    """A hash of everything that a run's numbers depend on."""
    recipe = recipe | machine
    used = {name: value for name, value in recipe.items() if name != "k" or method == "knn"}
    digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for path in (Path(recipe["config"]), *(ROOT / name for name in FILES)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run's record; those not yet there are made, seed by seed."""
    import torch

    from ldm.evaluation.noise_study import Bench, Recipe
    from ldm.util import atomic_path, pick_device

    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    device = pick_device(options.device)
    trials = [(method, seed) for seed in options.seeds for method in options.methods]
    bench, records = None, []
    for number, (method, seed) in enumerate(trials, 1):
        key = key_of(asdict(recipe), method, device=device.type, torch=torch.__version__)
        path = Path(options.outdir) / f"{method}-{seed}-{key}.json"
        if path.is_file():
            records.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        print(f"\nRun {number} of {len(trials)}: {method}, seed {seed}", flush=True)
        bench = bench or Bench(recipe, device)
        record = {"method": method, "seed": seed, "key": key, "recipe": asdict(recipe), **bench.run(method, seed)}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        records.append(record)
        report(records, options)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row a method and measured step, means and deviations over seeds, in Markdown."""
    from ldm.evaluation.records import spread

    recipe = records[0]["recipe"]
    lines = [
        f"Batch {recipe['batch_size']}, learning rate {recipe['learning_rate']:g}, {recipe['pictures']} pictures a "
        f"point, guidance {recipe['scale']:g}, KNN with k = {recipe['k']}; mean ± standard deviation over seeds.",
        "",
        "| step | noise | seeds | FID (tiny features) | KID (tiny features) | pictures right | of unseen pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, point in enumerate(records[0]["curve"]):
        for method in dict.fromkeys(record["method"] for record in records):
            points = [record["curve"][place] for record in records if record["method"] == method]
            right, unseen = ([p[name] for p in points] for name in ("accuracy", "accuracy_unseen"))
            lines.append(
                f"| {point['step']} | {method} | {len(points)} | {spread([p['fid'] for p in points])} "
                f"| {spread([p['kid'] for p in points], '.4f')} | {spread(right, '.1f', 100)} % "
                f"| {spread(unseen, '.1f', 100)} % |"
            )
    lines += ["", "| noise | seconds of training | share of them in pairing noise |", "|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == method]
        share = mean(run["noise_share"] for run in runs)
        lines.append(f"| {method} | {spread([run['training_seconds'] for run in runs], '.0f')} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def report(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Write table.md and curve.png of what is there; the table's text."""
    from ldm.evaluation.plot import Panel, draw_panels
    from ldm.evaluation.records import write_table
    from ldm.modules.pictures import save_picture

    def curves(name: str) -> dict[str, list[list[tuple[float, float]]]]:
        return {
            method: [[(p["step"], p[name]) for p in r["curve"]] for r in records if r["method"] == method]
            for method in dict.fromkeys(record["method"] for record in records)
        }

    label = f"training steps at batch {options.batch_size}"
    panels = [
        Panel("FID (tiny features)", label, curves("fid")),
        Panel("pictures right in everything", label, curves("accuracy"), percent=True),
    ]
    save_picture(draw_panels(panels), Path(options.outdir) / "curve.png")
    text = table(records)
    write_table(options.outdir, text)
    return text


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write and print the table."""
    options = parser().parse_args(argv)
    check(options)
    text = report(run_all(options), options)
    print(f"\n{text}\nKept in {options.outdir}: table.md, curve.png, and a JSON file of each run")


if __name__ == "__main__":
    cli.run(main)
