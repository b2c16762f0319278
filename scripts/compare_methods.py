"""Which way to personalise? Every one on the same subject of the tiny world: similarity, drift, time, memory, size.

python scripts/compare_methods.py      twelve minutes on 4 cores; stopped and started again, it goes on run by run
python scripts/compare_methods.py --methods lora unet --learning_rates lora=1e-3,2e-3 unet=1e-4,2e-4 --seeds 7

Every run is a training as main_dream_booth.py does it, in a process of its own with one thread, on photos of a toy with
prior images beside them; what it leaves behind is put into the untrained model, which draws. The columns are those of
PEFT's method comparison. The output folder gets a JSON file and a picture a run, table.md, plane.png (similarity
against drift) and pictures.png (all methods, for people to look at).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TINY = "configs/personalize/tiny-"
# What it is called in tables, and its yaml.
METHODS = {
    "adapters": ("adapters attn2o-ffni", "configs/tiny/dreambooth.yaml"),
    "lora": ("LoRA", f"{TINY}lora.yaml"),
    "lora-text": ("LoRA + text encoder", f"{TINY}lora-text.yaml"),
    "embedding": ("textual inversion", f"{TINY}embedding.yaml"),
    "pivotal": ("inversion + LoRA", f"{TINY}pivotal.yaml"),
    "unet": ("whole U-Net", f"{TINY}unet.yaml"),
    "unet-text": ("U-Net + text encoder", f"{TINY}unet-text.yaml"),
}
MOST_DRIFT = 5.0  # points of accuracy that other prompts may lose
SHOWN = 4  # pictures of each kind on the sheet of all methods
PICTURE_FLAGS = ("prior_images", "pictures", "others", "sampling_steps")


@dataclass(frozen=True)
class Trial:
    """One training run."""

    method: str
    learning_rate: float
    steps: int
    seed: int

    @property
    def yaml(self) -> str:
        """Its configuration."""
        return str(ROOT / METHODS[self.method][1])

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.method}-{self.learning_rate:g}-{self.steps}-{self.seed}"


@dataclass(frozen=True)
class Row:
    """The runs of one method with one learning rate."""

    method: str
    learning_rate: float
    runs: Sequence[dict[str, Any]]

    @property
    def similarity(self) -> float:
        """The mean over seeds."""
        return mean(run["similarity"] for run in self.runs)

    @property
    def drift(self) -> float:
        """The mean over seeds, in points."""
        return mean(run["drift"] for run in self.runs)


def rates(text: str) -> tuple[str, list[float]]:
    """`METHOD=A,B`, as an argparse type."""
    method, _, numbers = text.partition("=")
    try:
        found = [float(number) for number in numbers.split(",")]
    except ValueError:
        found = []
    if method not in METHODS or not found or not all(0 < rate < 1 for rate in found):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not METHOD=RATE,RATE with a method of {', '.join(METHODS)} and rates between 0 and 1"
        )
    return method, found


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(
        description="Train every way to personalise on the same photos of a toy of the tiny world, and compare what "
        "comes of it: likeness of its pictures to the photos, what other prompts lost, and what it costs.",
        epilog="Similarity: mean cosine of pictures of the subject to its photos, 1 is the same. Drift: how many "
        "points fewer of the other prompts are drawn right (a reader of the tiny world's pictures says so). The best "
        f"method is the most similar one with a drift of at most {MOST_DRIFT:g} points; so is the best of several "
        "learning rates. Seconds are processor time of one thread, which other programs hardly lengthen; memory is "
        "the peak of training beyond what its process held with the model and the photos loaded.",
    )
    flag = parser.add_argument
    flag("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="which ways")
    flag("--learning_rates", nargs="+", type=rates, default=[], metavar="METHOD=RATE,RATE",
         help="rates to try, other than the yaml's; the table has the best of each method")  # fmt: skip
    flag("--steps", type=int, default=150, help="training steps of every run")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of photos, prior images, training and pictures")
    flag("--subject", default="ball", help="ball, flower or house")
    flag("--prior_images", type=int, default=192, help="made by the untrained model, once a seed")
    flag("--pictures", type=int, default=20, help="of the subject, by which similarity is measured")
    flag("--others", type=int, default=80, help="other prompts, by which drift is measured")
    flag("--sampling_steps", type=int, default=10, help="steps a picture")
    flag("--features", default="tiny-world",
         help="what similarity is measured in: tiny-world, or a folder with CLIP's or DINO's weights")  # fmt: skip
    flag("--processes", type=int, default=os.cpu_count() or 1, help="runs at once, one thread and about 1 GB each")
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--outdir", default="outputs/compare_methods", help="where runs, table and pictures are kept")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    from ldm.hub import is_hub_name

    for name in (*PICTURE_FLAGS, "processes", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    for method, _ in options.learning_rates:
        if method not in options.methods:
            raise UserError(f"--learning_rates: {method} is none of --methods {' '.join(options.methods)}")
    for name in ("config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")
    features = options.features
    if features != "tiny-world" and not Path(features).is_dir() and not is_hub_name(features):
        raise UserError(f"--features: '{features}' is neither tiny-world nor a folder with CLIP's or DINO's weights")


# ---- the runs -------------------------------------------------------------------------------------------------


def setting_of(options: argparse.Namespace, trial: Trial | None = None) -> Any:
    """What all runs have in common; of a trial, its yaml and steps too."""
    from ldm.evaluation.subject_bench import Setting

    names = ("subject", *PICTURE_FLAGS, "config", "ckpt")
    setting = Setting(**{name: getattr(options, name) for name in names})
    return replace(setting, base=trial.yaml, steps=trial.steps) if trial else setting


def settings_of(options: argparse.Namespace, trial: Trial) -> dict[str, Any]:
    """What a record depends on: one that was made under other settings is made anew."""
    return setting_of(options, trial).record() | {"base": METHODS[trial.method][1], "features": options.features}


def trials_of(options: argparse.Namespace) -> list[Trial]:
    """Every method, with its yaml's learning rate where the flags say no others; seed by seed."""
    from ldm.util import load_yaml

    wanted, found = dict(options.learning_rates), []
    for method in options.methods:
        yaml = load_yaml(ROOT / METHODS[method][1])
        found += [(method, rate) for rate in wanted.get(method, [float(yaml.model.base_learning_rate)])]
    return list(dict.fromkeys(Trial(*one, options.steps, seed) for seed in options.seeds for one in found))


def bench_of(options: argparse.Namespace, seed: int) -> Any:
    """A seed's photos, prior images and pictures of the untrained model; the work of a process."""
    from ldm.evaluation.subject_bench import Bench
    from ldm.evaluation.trials import bench_folder

    return Bench(setting_of(options), seed, bench_folder(options, seed))


def run(options: argparse.Namespace, trial: Trial, tell: Any) -> None:
    """Train, draw, measure, and keep the record and pictures; the work of a process, which tells its steps."""
    from ldm.evaluation.cost import training_meter
    from ldm.evaluation.records import Records
    from ldm.modules.pictures import save_picture

    bench, meter, out = bench_of(options, trial.seed), training_meter(), Path(options.outdir)
    words = [f"model.base_learning_rate={trial.learning_rate}", "lightning.trainer.logger=false"]
    name = f"{trial.name}-{os.getpid()}"
    result = bench.train(name, words, base=trial.yaml, steps=trial.steps, tell=tell, callbacks=[meter])
    after = bench.draw(result.files)
    paths = [path for file in result.files for path in (file, *file.rglob("*")) if path.is_file()]
    record = {
        **asdict(trial), **bench.compare(after), **scores(bench, after, options.features), "parameters": result.trained,
        "seconds": meter.seconds, "memory": meter.bytes, "size": sum(path.stat().st_size for path in paths),
    }  # fmt: skip
    shutil.rmtree(result.folder.parent)
    for kind, images in vars(after).items():
        for i, image in enumerate(images[:SHOWN]):
            save_picture(image, out / "pictures" / trial.name / f"{kind}-{i}.png")
    save_picture(bench.sheet(after, f"{METHODS[trial.method][0]}, seed {trial.seed}"), out / f"{trial.name}.png")
    Records(out).keep(trial.name, settings_of(options, trial), record)


def scores(bench: Any, after: Any, features: str) -> dict[str, float]:
    """Similarity, of the untrained model's pictures, of these, and of the photos among themselves; drift in points."""
    from ldm.evaluation.judges import TinyWorld, judge_of

    judge, photos = judge_of(features), bench.photos
    return {
        "similarity_before": judge.similarity(bench.before.subject, photos),
        "similarity": judge.similarity(after.subject, photos),
        "similarity_photos": judge.similarity(photos, photos),
        "drift": 100 * TinyWorld().drift(bench.before.others, after.others, bench.prompts["others"]),
    }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every trial's record."""
    from ldm.evaluation.trials import run_trials

    return run_trials({trial: settings_of(options, trial) for trial in trials_of(options)}, bench_of, run, options)


# ---- the report -----------------------------------------------------------------------------------------------


def rows_of(records: Sequence[dict[str, Any]]) -> list[Row]:
    """A row a method and learning rate."""
    keys = dict.fromkeys((r["method"], r["learning_rate"]) for r in records)
    return [Row(*key, [r for r in records if (r["method"], r["learning_rate"]) == key]) for key in keys]


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Every method with its best learning rate, the best method first."""
    from ldm.evaluation.ranking import best_of, ranked

    methods = dict.fromkeys(row.method for row in rows)
    return ranked([best_of([row for row in rows if row.method == m], MOST_DRIFT) for m in methods], MOST_DRIFT)


def cells(row: Row) -> list[str]:
    """What the tables tell of similarity and drift."""
    from ldm.evaluation.records import spread

    return [
        METHODS[row.method][0], f"{row.learning_rate:g}", str(row.runs[0]["steps"]),
        spread([run["similarity"] for run in row.runs], ".3f"), spread([run["drift"] for run in row.runs], ".1f"),
    ]  # fmt: skip


def table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A row a method, the best first, below the untrained model; then all learning rates, if there are several."""
    from ldm.evaluation.records import spread

    runs = [run for row in rows for run in row.runs]
    first = {run["seed"]: run for run in runs}.values()
    photos, before = (mean(run[key] for run in runs) for key in ("similarity_photos", "accuracy_before"))
    lines = [
        f"Mean ± standard deviation over the seeds {', '.join(map(str, options.seeds))}. Similarity of "
        f"{options.pictures} pictures to the photos ({photos:.3f} among themselves), by {options.features}. Drift: "
        f"points lost of the {before:.1%} of {options.others} other prompts that the untrained model draws right.",
        "",
        "| method | learning rate | steps | similarity | drift, points | background right | seconds of training "
        "(processor, one thread) | memory of training, MiB | saved, MiB | trained parameters |",
        "|---" * 10 + "|",
        f"| untrained | | | {spread([run['similarity_before'] for run in first], '.3f')} | 0 | | | | | 0 |",
    ]
    for row in best_rows(rows):
        runs = row.runs
        rest = [
            f"{mean(run['background_after'] for run in runs):.0%}", spread([run["seconds"] for run in runs], ".0f"),
            spread([run["memory"] for run in runs], ".0f", 2**-20), f"{mean(run['size'] for run in runs) / 2**20:.2f}",
            f"{runs[0]['parameters']:,}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join([*cells(row), *rest])} |")
    if len(rows) > len(best_rows(rows)):
        lines += ["", "| method | learning rate | steps | similarity | drift, points |", "|---" * 5 + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def plane(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """Similarity against drift, a marker a method."""
    from ldm.evaluation.plot import draw_points

    first = {run["seed"]: run for row in rows for run in row.runs}.values()
    points = {"untrained": [(0.0, run["similarity_before"]) for run in first]}
    best = {row.method: row for row in best_rows(rows)}
    for method in filter(best.get, METHODS):
        points[METHODS[method][0]] = [(run["drift"], run["similarity"]) for run in best[method].runs]
    title = f"Each way to personalise; shaded: more than {MOST_DRIFT:g} points"
    return draw_points(
        points, title, "drift: points of other prompts lost", "similarity to the photos", most_x=MOST_DRIFT
    )


def pictures(rows: Sequence[Row], options: argparse.Namespace) -> Any:
    """What every method draws for the same prompts and seeds, on one sheet; of the first seed."""
    from PIL import Image

    from ldm.evaluation.sheet import Row as Strip
    from ldm.evaluation.sheet import draw_sheet

    out, seed = Path(options.outdir), options.seeds[0]
    prompts = setting_of(options).prompts()
    captions = [text.removeprefix("a photo of ") for kind in ("subject", "others") for text in prompts[kind][:SHOWN]]
    folder = out / f"seed-{seed}"

    def some(pattern: str, count: int = SHOWN) -> list[Any]:
        return [Image.open(path) for path in sorted(folder.glob(pattern))[:count]]

    strips = [
        Strip("the photos", "what it learns from", some(f"{options.subject}/*.png", 2 * SHOWN), gap=True),
        Strip("untrained", "", some("subject/*.png") + some("others/*.png"), captions),
    ]
    for row in best_rows(rows):
        of_seed = next(run for run in row.runs if run["seed"] == seed)
        kept = out / "pictures" / Trial(row.method, row.learning_rate, of_seed["steps"], seed).name
        drawn = [Image.open(kept / f"{kind}-{i}.png") for kind in ("subject", "others")
                 for i in range(min(SHOWN, len(prompts[kind])))]  # fmt: skip
        numbers = f"{of_seed['similarity']:.2f}, {of_seed['drift']:.1f} points"
        strips.append(Strip(METHODS[row.method][0], numbers, drawn))
    notes = ["Left: prompts of the subject; right: others, which should look as in the untrained model's row.",
             f"Beside the method: similarity and drift of seed {seed}."]  # fmt: skip
    return draw_sheet(strips, f"Seed {seed}, the same prompts and noises for every method", notes)


def report(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Write table.md, plane.png and pictures.png; the table's text."""
    from ldm.evaluation.records import write_table
    from ldm.modules.pictures import save_picture

    out, rows = Path(options.outdir), rows_of(records)
    text = table(rows, options)
    save_picture(plane(rows, options), out / "plane.png")
    save_picture(pictures(rows, options), out / "pictures.png")
    write_table(out, text)
    return text


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then tell."""
    options = parser().parse_args(argv)
    check(options)
    setting_of(options).prompts()  # a UserError where they cannot be
    from ldm.data.subjects import render_subject
    from ldm.evaluation.judges import judge_of

    render_subject(options.subject)  # likewise
    judge_of(options.features)
    text = report(run_all(options), options)
    print(
        f"\n{text}\nKept in {options.outdir}: table.md, plane.png, pictures.png, a JSON file and a picture of each run"
    )


if __name__ == "__main__":
    cli.run(main)
