"""Adapters against tuning the whole U-Net: how near they come, and what each does to other prompts.

python scripts/adapter_study.py            three seeds, several learning rates each; run again, it goes on where it was

Every run is one of main_dream_booth.py's on photos of a subject of the tiny world, with prior images of the class.
Finished runs are kept in the output folder, as JSON and as a picture. Of the whole U-Net's learning rates the one with
the highest similarity is taken, whatever it does to other prompts; of the adapters' the highest of those after which
at most 5 points fewer other prompts are drawn right. The gains compared: (adapters - base) / (whole U-Net - base).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

METHODS = {"adapters": "adapter", "whole U-Net": "unet"}
COST = {"adapters": 0.05, "whole U-Net": 1.0}  # how much of other prompts' accuracy the best learning rate may cost


@dataclass(frozen=True)
class Trial:
    """One training run."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{METHODS[self.method]}-{self.learning_rate:g}-{self.seed}"


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Compare adapters with tuning the whole U-Net, on the tiny model.")
    flag = parser.add_argument
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of photos, prior images, training and pictures")
    flag("--adapter_lrs", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2], help="learning rates of the adapters")
    flag("--unet_lrs", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4], help="learning rates of the whole U-Net")
    flag("--subject", default="ball", help="ball, flower or house")
    flag("--steps", type=int, default=300, help="training steps of every run")
    flag(
        "--prior_images",
        type=int,
        default=96,
        help="of the class, of other scenes and of no prompt, made by the untuned model",
    )
    flag("--pictures", type=int, default=25, help="of the subject, by which similarity is measured")
    flag("--others", type=int, default=100, help="other prompts, by which the loss of accuracy is measured")
    flag("--sampling_steps", type=int, default=20, help="steps a picture")
    flag("--base", default="configs/tiny/dreambooth.yaml", help="yaml of the training")
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--outdir", default="outputs/adapter_study", help="where runs and the table are kept")
    return parser


def setting_of(options: argparse.Namespace) -> Any:
    """What all runs have in common."""
    from ldm.evaluation.subject_bench import Setting

    return Setting(**{name: getattr(options, name) for name in Setting.__dataclass_fields__})


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    for name in ("steps", "prior_images", "pictures", "others", "sampling_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    for name in ("adapter_lrs", "unet_lrs"):
        if not all(0 < rate < 1 for rate in getattr(options, name)):
            raise UserError(f"--{name}: learning rates lie between 0 and 1")
    for name in ("base", "config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")


def run(bench: Any, trial: Trial, outdir: Path) -> dict[str, Any]:
    """Train, draw and measure; the record of the run, and its picture."""
    from ldm.modules.pictures import save_picture

    words = [f"model.params.train_level=[{METHODS[trial.method]}]", f"model.base_learning_rate={trial.learning_rate}"]
    result = bench.train(trial.name, words)
    after = bench.draw(result.files)
    shutil.rmtree(result.folder.parent)
    title = f"{trial.method}, learning rate {trial.learning_rate:g}, seed {trial.seed}"
    save_picture(bench.sheet(after, title), outdir / f"{trial.name}.png")
    numbers = bench.compare(after)
    return {
        **asdict(trial),
        **numbers,
        "trained": result.trained,
        "share": result.trained / bench.whole,
        "seconds": round(result.seconds, 1),
    }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every trial's record; those not yet there are made."""
    from ldm.evaluation.records import Records
    from ldm.evaluation.subject_bench import Bench

    rates = {"adapters": options.adapter_lrs, "whole U-Net": options.unet_lrs}
    trials = [Trial(method, rate, seed) for seed in options.seeds for method in METHODS for rate in rates[method]]
    setting, out, bench, records = setting_of(options), Path(options.outdir), None, []
    for number, trial in enumerate(trials, 1):
        record = Records(out).kept(trial.name, setting.record())
        if record is None:
            print(f"\nRun {number} of {len(trials)}: {trial.name}", flush=True)
            if bench is None or bench.seed != trial.seed:
                bench = Bench(setting, trial.seed, out / f"seed-{trial.seed}")
            record = Records(out).keep(trial.name, setting.record(), run(bench, trial, out))
        records.append(record)
    return records


def average(records: Sequence[dict[str, Any]], key: str) -> float:
    """The mean of one number over runs."""
    return mean(record[key] for record in records)


def best_rate(records: Sequence[dict[str, Any]], method: str) -> float:
    """The learning rate with the highest similarity, on the average of the seeds, of those within `COST` if any is."""
    rates = {r["learning_rate"] for r in records if r["method"] == method}

    def of(rate: float, key: str) -> float:
        return average([r for r in records if (r["method"], r["learning_rate"]) == (method, rate)], key)

    affordable = [rate for rate in sorted(rates) if round(of(rate, "accuracy_change"), 6) >= -COST[method]]
    return max(affordable or sorted(rates), key=lambda rate: of(rate, "similarity_after"))


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row a method and learning rate, the means over seeds, in Markdown; the best rate of each is marked."""
    lines = [
        "| method | learning rate | similarity | other prompts right | change | pixels changed | trained | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| base | | {average(records, 'similarity_before'):.3f} | {average(records, 'accuracy_before'):.1%} | | | | |",
    ]
    best = {method: best_rate(records, method) for method in METHODS}
    for method, rate in sorted({(r["method"], r["learning_rate"]) for r in records}):
        runs = [r for r in records if (r["method"], r["learning_rate"]) == (method, rate)]
        mark = " (best)" if best[method] == rate else ""
        lines.append(
            f"| {method} | {rate:g}{mark} | {average(runs, 'similarity_after'):.3f} "
            f"| {average(runs, 'accuracy_after'):.1%} | {100 * average(runs, 'accuracy_change'):+.1f} points "
            f"| {average(runs, 'pixel_change'):.1%} | {average(runs, 'share'):.2%} | {average(runs, 'seconds'):.0f} |"
        )
    return "\n".join(lines)


def verdict(records: Sequence[dict[str, Any]]) -> str:
    """The gain of adapters beside that of the whole U-Net, each with its best rate: all seeds, and each."""
    best = {
        method: [r for r in records if r["method"] == method and r["learning_rate"] == best_rate(records, method)]
        for method in METHODS
    }

    def gain(seeds: set[int]) -> float:
        gains = {
            method: mean(r["similarity_after"] - r["similarity_before"] for r in runs if r["seed"] in seeds)
            for method, runs in best.items()
        }
        return gains["adapters"] / gains["whole U-Net"]

    seeds = sorted({r["seed"] for r in records})
    each = ", ".join(f"seed {seed}: {gain({seed}):.2f}" for seed in seeds)
    return (
        f"(adapters - base) / (whole U-Net - base) = {gain(set(seeds)):.3f} ({each}); with adapters, the share of "
        f"other prompts drawn right changes by {100 * average(best['adapters'], 'accuracy_change'):+.1f} points, "
        f"{average(best['adapters'], 'share'):.2%} of the U-Net's parameters trained"
    )


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then print and write the table."""
    options = parser().parse_args(argv)
    check(options)
    setting_of(options).prompts()  # a UserError where they cannot be
    records = run_all(options)
    from ldm.evaluation.records import write_table

    text = f"{table(records)}\n\n{verdict(records)}\n"
    write_table(options.outdir, text)
    print(f"\n{text}\nKept in {options.outdir}: table.md, and a JSON file and a picture of each run")


if __name__ == "__main__":
    cli.run(main)
