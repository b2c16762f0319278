"""Does a pruned student learn more from its teacher than alone? On the tiny model, for equal steps, several seeds.

python scripts/distill_study.py            about an hour on 4 cores; run again, it goes on where it was

Every run is one of main.py's with a yaml of configs/distill: students of two sizes, cut out of the tiny model's
weights, each with the teacher's output and features in its loss and without. They are then measured by the share of
pictures of captions never seen in training that the reader finds right in everything, the teacher beside them, and by
time and memory of their U-Nets. The output folder gets one JSON a run, table.md and pictures.png.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
STUDENTS = ("tiny-small", "tiny-tiny")
WAYS = {"taught": "", "untaught": "-untaught"}  # way -> ending of the yaml's name
TEACHER = "teacher"
SHOWN = 8  # pictures of each model


@dataclass(frozen=True)
class Trial:
    """One training run."""

    student: str
    way: str
    seed: int

    @property
    def yaml(self) -> Path:
        """Its configuration."""
        return ROOT / f"configs/distill/{self.student}{WAYS[self.way]}.yaml"

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.student}-{self.way}-{self.seed}"


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Train pruned students with and without their teacher, and compare them.")
    flag = parser.add_argument
    flag("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="which cuts")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of order, timesteps, noise; each with all students")
    flag("--steps", type=int, default=100, help="training steps of every run, at the yaml's batch of 32")
    flag("--learning_rate", type=float, default=6e-4, help="at its highest; it falls to nothing at the last step")
    flag("--pictures", type=int, default=400, help="of captions never seen in training, by which models are measured")
    flag("--sampling_steps", type=int, default=20, help="of DPM-Solver++, a picture")
    flag("--scale", type=float, default=3.0, help="guidance scale of the pictures")
    flag("--rounds", type=int, default=15, help="forward passes by which the U-Nets are timed, side by side")
    flag("--batches", type=int, nargs="+", default=[2, 32], help="of those passes: 2 is a guided picture")
    flag("--device", default="auto", help="auto, cuda or cpu")
    flag("--outdir", default="outputs/distill_study", help="where runs, table and pictures are kept")
    parser.add_argument("overrides", nargs="*", default=[], help="key.subkey=value, over the yaml of every run")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers that cannot be."""
    for name in ("steps", "pictures", "sampling_steps", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if min(options.batches) < 1:
        raise UserError(f"--batches {min(options.batches)}: must be at least 1")
    if not 0 < options.learning_rate < 1:
        raise UserError(f"--learning_rate {options.learning_rate:g}: must lie between 0 and 1")
    for word in options.overrides:
        if "=" not in word:
            raise UserError(f"'{word}' is not of the form key.subkey=value")


def settings_of(options: argparse.Namespace, *files: Path) -> dict[str, Any]:
    """What a record depends on: one that was made under other settings is made anew."""
    names = ("steps", "learning_rate", "pictures", "sampling_steps", "scale", "overrides")
    files = (*files, ROOT / "models/tiny/model.safetensors")
    return {name: getattr(options, name) for name in names} | {
        f"{file.name}_sha256": hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


class Bench:
    """What the runs share: the cache of their training set, and the teacher."""

    def __init__(self, options: argparse.Namespace, device: Any) -> None:
        from scripts import cache_latents

        self.options, self.device, self.out = options, device, Path(options.outdir)
        self.cache = self.out / "latents"
        cache_latents.main([
            "--base", str(Trial(STUDENTS[0], "taught", 0).yaml), *options.overrides, "--outdir", str(self.cache),
            "--batch_size", "100", "--device", device.type,
        ])  # fmt: skip

    def train(self, trial: Trial, folder: Path) -> Path:
        """Run main.py's main, and return the run's folder."""
        import main

        steps = self.options.steps
        main.main([
            "--base", str(trial.yaml), f"model.base_learning_rate={self.options.learning_rate}",
            f"model.params.scheduler_config.params.max_decay_steps={steps}",
            f"data.params.cache_latents={self.cache}", "lightning.trainer.logger=false",
            "lightning.callbacks.image_logger.params.disabled=true",
            f"lightning.modelcheckpoint.params.every_n_train_steps={steps}", *self.options.overrides,
            "-t", "--scale_lr", "False", "-n", trial.name, "-l", str(folder), "--max_steps", str(steps),
            "--seed", str(trial.seed), "--accelerator", "gpu" if self.device.type == "cuda" else "cpu",
        ])  # fmt: skip
        (run,) = folder.iterdir()
        return run

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train a student, keep its weights, and measure it."""
        from ldm.loading import load_model

        folder = self.out / "runs" / trial.name
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        run = self.train(trial, folder)
        seconds = time.perf_counter() - start
        model = load_model(run / "configs/project.yaml", run / "checkpoints/last.ckpt", self.device)
        numbers = self.measure(model, trial.name)
        shutil.rmtree(folder)
        return {**numbers, "training_seconds": round(seconds, 1)}

    def measure(self, model: Any, name: str) -> dict[str, Any]:
        """A model's accuracy, in everything and by attribute; its first pictures are kept."""
        from ldm.evaluation.prompt_following import accuracy_of, evaluate
        from ldm.inference import txt2img

        options = self.options

        def draw(captions: list[str], seeds: list[int]) -> list[Any]:
            pictures = txt2img(model, captions, seeds=seeds, sampler="dpm_solver", steps=options.sampling_steps,
                               scale=options.scale, batch_size=50, exact=False)  # fmt: skip
            return [picture.image for picture in pictures]

        judgements = evaluate(draw, options.pictures)
        folder = self.out / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, judgement in enumerate(judgements[:SHOWN]):
            judgement.image.save(folder / f"{i}.png")
        return {
            "accuracy": accuracy_of(judgements),
            "shown": [{"caption": j.caption, "right": j.right["all"]} for j in judgements[:SHOWN]],
            "parameters": sum(p.numel() for p in model.model.diffusion_model.parameters()),
        }

    def costs(self) -> dict[str, dict[str, dict[str, float]]]:
        """Batch size -> model -> seconds and peak bytes of a forward pass of its U-Net, side by side."""
        import torch

        from ldm.evaluation.cost import side_by_side
        from ldm.util import instantiate_from_config, load_yaml

        yamls = {TEACHER: ROOT / "models/tiny/config.yaml"}
        yamls |= {student: Trial(student, "taught", 0).yaml for student in STUDENTS}
        sections = {name: load_yaml(path).model.params.unet_config for name, path in yamls.items()}
        unets = {name: instantiate_from_config(section).to(self.device).eval() for name, section in sections.items()}
        out = {}
        for batch in self.options.batches:
            inputs = torch.randn(batch, 4, 16, 16), torch.full((batch,), 500), torch.randn(batch, 77, 128)
            inputs = [value.to(self.device) for value in inputs]
            with torch.inference_mode():
                works = {name: partial(unet, *inputs) for name, unet in unets.items()}
                out[str(batch)] = side_by_side(works, self.options.rounds, self.device)
        return out


def run_all(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The records of the teacher, of every run and of the costs; those not yet there are made, seed by seed."""
    from ldm.evaluation.records import Records
    from ldm.util import pick_device

    device, finished = pick_device(options.device), Records(Path(options.outdir))
    bench: Bench | None = None

    def record_of(name: str, settings: dict[str, Any], make: Any, **facts: Any) -> dict[str, Any]:
        nonlocal bench
        record = finished.kept(name, settings)
        if record is None:
            print(f"\n{name}", flush=True)
            bench = bench or Bench(options, device)
            record = finished.keep(name, settings, {**facts, **make(bench)})
        return record

    machine = {"device": device.type}
    teacher = record_of(
        TEACHER, settings_of(options) | machine, lambda bench: bench.measure(tiny_model(device), TEACHER)
    )
    records = []
    for seed in options.seeds:
        for student in options.students:
            for way in WAYS:
                trial = Trial(student, way, seed)
                settings = settings_of(options, trial.yaml) | machine
                facts = {"student": student, "way": way, "seed": seed}
                records.append(record_of(trial.name, settings, lambda bench, t=trial: bench.run(t), **facts))
                if len(records) > 1:
                    report(teacher, records, None, options)
    costs = record_of(
        "costs",
        machine | {"rounds": options.rounds, "batches": options.batches},
        lambda bench: {"batches": bench.costs()},
    )
    return teacher, records, costs


def tiny_model(device: Any) -> Any:
    """The teacher, to draw with."""
    from ldm.loading import load_model

    return load_model(ROOT / "models/tiny/config.yaml", ROOT / "models/tiny/model.safetensors", device)


def table(teacher: dict[str, Any], records: Sequence[dict[str, Any]], costs: dict[str, Any] | None) -> str:
    """A row a student and way, then what the U-Nets cost, in Markdown."""
    from ldm.evaluation.records import spread

    settings, whole = records[0]["settings"], teacher["parameters"]
    lines = [
        f"{settings['steps']} steps of 32 samples, learning rate {settings['learning_rate']:g}; "
        f"{settings['pictures']} pictures of captions never seen in training, {settings['sampling_steps']} steps of "
        f"DPM-Solver++, guidance {settings['scale']:g}; mean ± standard deviation over seeds.",
        "",
        "| model | parameters | of the teacher's | seeds | pictures right in everything | points behind the teacher |",
        "|---|---|---|---|---|---|",
        f"| teacher | {whole:,} | 100 % | | {teacher['accuracy']['all']:.1%} | |",
    ]
    for student, way in dict.fromkeys((r["student"], r["way"]) for r in records):
        runs = [r for r in records if (r["student"], r["way"]) == (student, way)]
        right = [run["accuracy"]["all"] for run in runs]
        lines.append(
            f"| {student}, {way} | {runs[0]['parameters']:,} | {runs[0]['parameters'] / whole:.1%} | {len(runs)} "
            f"| {spread(right, '.1f', 100)} % | {100 * (teacher['accuracy']['all'] - mean(right)):.1f} |"
        )
    return "\n".join([*lines, *(cost_lines(costs["batches"]) if costs else [])]) + "\n"


def cost_lines(batches: dict[str, Any]) -> list[str]:
    """The part of the table that says what a forward pass of each U-Net costs."""
    lines = [
        "",
        "| U-Net | batch | milliseconds a pass (median) | speed, of the teacher's | memory beside the weights "
        "| of the teacher's |",
        "|---|---|---|---|---|---|",
    ]
    for batch, costs in batches.items():
        for name, cost in costs.items():
            speed, room = costs[TEACHER]["seconds"] / cost["seconds"], cost["bytes"] / max(costs[TEACHER]["bytes"], 1)
            lines.append(
                f"| {name} | {batch} | {1000 * cost['seconds']:.1f} | {speed:.2f} | {cost['bytes'] / 2**20:.1f} MiB "
                f"| {room:.2f} |"
            )
    return lines


def report(
    teacher: dict[str, Any],
    records: Sequence[dict[str, Any]],
    costs: dict[str, Any] | None,
    options: argparse.Namespace,
) -> str:
    """Write table.md and pictures.png of what is there; the table's text."""
    from PIL import Image

    from ldm.evaluation.records import write_table
    from ldm.evaluation.sheet import Row, draw_sheet
    from ldm.modules.pictures import save_picture

    def row(name: str, title: str, subtitle: str, record: dict[str, Any]) -> Row:
        pictures = [Image.open(out / "pictures" / name / f"{i}.png") for i in range(len(record["shown"]))]
        captions = [s["caption"] if name == TEACHER else "right" if s["right"] else "wrong" for s in record["shown"]]
        return Row(title, subtitle, pictures, captions)

    out, first = Path(options.outdir), records[0]["seed"]
    rows = [row(TEACHER, "teacher", f"{teacher['accuracy']['all']:.1%} right", teacher)]
    for record in records:
        if record["seed"] == first:
            name = Trial(record["student"], record["way"], first).name
            subtitle = f"{record['way']}, {record['accuracy']['all']:.1%} right"
            rows.append(row(name, record["student"], subtitle, record))
    title = f"Students of the tiny model after {options.steps} steps"
    save_picture(draw_sheet(rows, title), out / "pictures.png")
    text = table(teacher, records, costs)
    write_table(out, text)
    return text


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write and print the table."""
    options = parser().parse_args(argv)
    check(options)
    text = report(*run_all(options), options)
    print(f"\n{text}\nKept in {options.outdir}: table.md, pictures.png, and a JSON file of each run")


if __name__ == "__main__":
    cli.run(main)
