"""How well does a Flash student draw in 4, 2 and 1 steps? On the tiny model, beside its teacher with many and with few.

python scripts/flash_study.py              trains and measures; run again, it goes on where it was

The student is trained by main.py with configs/distill/flash-tiny.yaml, once a seed. Everyone then draws the same
captions, which were never seen in training, from the same noises. What is counted: the pictures that the reader finds
right in everything; the FID, by the tiny world's features, from true pictures of such captions; and calls of the
network. The output folder gets one JSON a model, table.md, and pictures.png with the teacher's and the student's
pictures below each other.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError
from ldm.samplers import SAMPLERS

TEACHER, UNTRAINED, STUDENT = "teacher", "teacher, no guidance", "student"
COUNTED = [name for name, choice in SAMPLERS.items() if choice.evaluations]
SHOWN = 8  # pictures of each row


@dataclass(frozen=True)
class Way:
    """How pictures are drawn: by whom, and in how many steps of a sampler."""

    model: str
    sampler: str
    steps: int
    scale: float = 1.0

    @property
    def calls(self) -> int:
        """Pictures that the network sees for one: two a step with guidance."""
        return SAMPLERS[self.sampler].evaluations(self.steps) * (2 if self.scale != 1.0 else 1)

    @property
    def name(self) -> str:
        """What it is called in the table and in the picture."""
        return f"{self.sampler}, {self.steps} step{'s' * (self.steps > 1)}"


def ways_of(model: str, options: argparse.Namespace) -> list[Way]:
    """Everything that a model is measured by."""
    few = [Way(model, "lcm", steps) for steps in options.student_steps]
    if model == STUDENT:
        return few
    guided = [Way(TEACHER, "plms", options.teacher_steps, options.scale)]
    guided += [Way(TEACHER, sampler, max(options.student_steps), options.scale) for sampler in options.samplers]
    return guided + [Way(UNTRAINED, way.sampler, way.steps) for way in few]


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Train a Flash student of the tiny model, and compare it with its teacher.")
    flag = parser.add_argument
    flag("--seeds", type=int, nargs="+", default=[0], help="of the training")
    flag("--pictures", type=int, default=200, help="of captions never seen in training")
    flag("--student_steps", type=int, nargs="+", default=[4, 2, 1], help="in which the student draws, without guidance")
    flag("--teacher_steps", type=int, default=50, help="in which the teacher draws by PLMS, with guidance")
    flag("--samplers", nargs="+", choices=COUNTED, default=["plms", "ddim", "dpm_solver"],
         help="by which the teacher draws in as few steps as the student takes at most")  # fmt: skip
    flag("--scale", type=float, default=3.0, help="the teacher's guidance scale")
    flag("--true_pictures", type=int, default=1000, help="with which the FID compares")
    flag("--batch_size", type=int, default=50, help="pictures at a time")
    flag("--base", default="configs/distill/flash-tiny.yaml", help="yaml of the training")
    flag("--config", default="models/tiny/config.yaml", help="yaml of the teacher")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--device", default="auto", help="on which pictures are drawn: auto, cuda or cpu")
    flag("--outdir", default="outputs/flash_study", help="where runs, table and pictures are kept")
    flag("overrides", nargs="*", default=[], help="key.subkey=value, over the yaml of the training")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    for name in ("teacher_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if min(options.student_steps) < 1:
        raise UserError(f"--student_steps {min(options.student_steps)}: must be at least 1")
    for name in ("pictures", "true_pictures"):
        if getattr(options, name) < 2:
            raise UserError(f"--{name} {getattr(options, name)}: a distance needs at least 2")
    for name in ("base", "config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")
    for word in options.overrides:
        if "=" not in word:
            raise UserError(f"'{word}' is not of the form key.subkey=value")


def settings_of(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """What a record depends on: one that was made under other settings is made anew."""
    names = ["pictures", "true_pictures", "student_steps", "config"]
    names += ["base", "overrides"] if model == STUDENT else ["teacher_steps", "samplers", "scale"]
    files = ["config", "ckpt", *(["base"] if model == STUDENT else [])]
    return {name: getattr(options, name) for name in names} | {
        f"{name}_sha256": hashlib.sha256(Path(getattr(options, name)).read_bytes()).hexdigest() for name in files
    }


class Bench:
    """What all models share: captions, and the features of true pictures."""

    def __init__(self, options: argparse.Namespace) -> None:
        from ldm.data.shapes import ShapesDataset, render
        from ldm.evaluation.distances import Statistics
        from ldm.evaluation.prompt_following import evaluation_scenes
        from ldm.evaluation.quality import FeatureNet
        from ldm.util import pick_device

        self.options, self.device = options, pick_device(options.device)
        self.captions = [scene.caption for scene in evaluation_scenes(options.pictures)]
        self.features = FeatureNet.pick("tiny", None, self.device)
        dataset = ShapesDataset(split="test", length=options.true_pictures)
        true = [render(dataset.scene(i)) for i in range(options.true_pictures)]
        self.truth = Statistics.of(self.features.of_images(true))

    def measure(self, model: Any, ways: Sequence[Way], folder: Path) -> list[dict[str, Any]]:
        """The numbers of each way; some of its pictures are put into `folder`."""
        from ldm.evaluation.distances import Statistics, frechet_distance
        from ldm.evaluation.prompt_following import accuracy_of, judge
        from ldm.inference import txt2img
        from ldm.modules.pictures import save_picture

        rows = []
        for way in ways:
            start = time.perf_counter()
            drawn = txt2img(
                model, self.captions, seed=0, sampler=way.sampler, steps=way.steps, scale=way.scale,
                batch_size=self.options.batch_size, exact=False, progress=False,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            images = [picture.image for picture in drawn]
            for i, image in enumerate(images[:SHOWN]):
                save_picture(image, folder / f"{way.model} {way.name}" / f"{i}.png")
            right = accuracy_of(judge(images, self.captions, range(len(images))))
            fid = frechet_distance(Statistics.of(self.features.of_images(images)), self.truth)
            rows.append({"model": way.model, "way": way.name, "calls": way.calls, "accuracy": right, "fid": fid,
                         "seconds_a_picture": seconds / len(images)})  # fmt: skip
            print(f"{way.model}, {way.name}: {right['all']:.1%} right, FID {fid:.2f}", flush=True)
        return rows

    def teacher(self, folder: Path) -> dict[str, Any]:
        """The record of the teacher."""
        from ldm.inference import load_model

        model = load_model(self.options.config, self.options.ckpt, self.device)
        return {"rows": self.measure(model, ways_of(TEACHER, self.options), folder)}

    def student(self, folder: Path, seed: int) -> dict[str, Any]:
        """Train a student, and measure it."""
        from ldm.inference import load_model

        start = time.perf_counter()
        lora = self.train(folder / "run", seed)
        seconds = time.perf_counter() - start
        model = load_model(self.options.config, self.options.ckpt, self.device, artefacts={lora: 1.0})
        rows = self.measure(model, ways_of(STUDENT, self.options), folder)
        kept = folder / "lora.safetensors"
        shutil.copyfile(lora, kept)
        shutil.rmtree(folder / "run")
        return {"rows": rows, "seconds": round(seconds, 1), "lora": str(kept), "lora_bytes": kept.stat().st_size}

    def train(self, logs: Path, seed: int) -> Path:
        """Run main.py's main, or go on with a run that was stopped; the LoRA's file."""
        import main

        options = self.options
        main.main([
            "--base", options.base, *options.overrides, "-t", "--scale_lr", "False", "--actual_resume", options.ckpt,
            "-n", "flash", "-l", str(logs), "--seed", str(seed), "--resume",
        ])  # fmt: skip
        files = logs.glob("*/checkpoints/*-lora.safetensors")
        return max(files, key=lambda path: int(path.name.partition("-")[0]))


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every model's record, the teacher's first; those not yet there are made."""
    from ldm.evaluation.records import Records

    finished, bench, records = Records(Path(options.outdir)), None, []
    for model, seed in [(TEACHER, None), *((STUDENT, seed) for seed in options.seeds)]:
        name = model if seed is None else f"{model}-{seed}"
        settings = settings_of(options, model)
        record = finished.kept(name, settings)
        if record is None:
            print(f"\n{name}", flush=True)
            bench = bench or Bench(options)
            folder = Path(options.outdir) / name
            made = bench.teacher(folder) if seed is None else bench.student(folder, seed)
            record = finished.keep(name, settings, {"model": model, "seed": seed, **made})
        records.append(record)
    return records


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and where there are several the standard deviation."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row a way of drawing, means over the seeds of students, in Markdown."""
    lines = [
        "| model | sampler | calls of the network | pictures right | shape | FID (tiny features) | seconds a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row for record in records for row in record["rows"]]
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        same = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        right, shape = ([100 * row["accuracy"][name] for row in same] for name in ("all", "shape"))
        lines.append(
            f"| {model} | {way} | {same[0]['calls']} | {spread(right, '.1f')} % | {spread(shape, '.1f')} % "
            f"| {spread([row['fid'] for row in same], '.2f')} | {mean(r['seconds_a_picture'] for r in same):.3f} |"
        )
    students = [record for record in records if record["model"] == STUDENT]
    lines += ["", f"{len(students)} student(s); training took {spread([r['seconds'] / 60 for r in students], '.0f')} "
                  f"minutes; the LoRA's file has {students[0]['lora_bytes'] / 2**20:.1f} MiB."]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw_picture(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write pictures.png: a row a way of drawing, of the same captions and noises; the first student's."""
    from PIL import Image

    from ldm.evaluation.prompt_following import evaluation_scenes
    from ldm.evaluation.sheet import Row, draw_sheet
    from ldm.modules.pictures import save_picture

    captions = [scene.caption for scene in evaluation_scenes(options.pictures)][:SHOWN]
    rows = []
    for record in records[:2]:
        name = record["model"] if record["seed"] is None else f"{record['model']}-{record['seed']}"
        for row in record["rows"]:
            folder = Path(options.outdir) / name / f"{row['model']} {row['way']}"
            pictures = [Image.open(folder / f"{i}.png") for i in range(min(SHOWN, options.pictures))]
            said = f"{row['way']}: {row['accuracy']['all']:.1%}"
            rows.append(Row(row["model"], said, pictures))
    rows[-1] = Row(rows[-1].title, rows[-1].subtitle, rows[-1].pictures, captions)
    title = f"Flash Diffusion on the tiny model, {options.pictures} captions never seen in training"
    save_picture(draw_sheet(rows, title), Path(options.outdir) / "pictures.png")


def main(argv: Sequence[str]) -> None:
    """Make what is missing, then write and print the table, and the picture."""
    options = parser().parse_args(argv)
    check(options)
    records = run_all(options)
    from ldm.evaluation.records import write_table

    text = table(records)
    write_table(options.outdir, text)
    draw_picture(records, options)
    print(f"\n{text}\nKept in {options.outdir}: table.md, pictures.png, a JSON file of each model, the students' LoRA")


if __name__ == "__main__":
    cli.run(main)
