"""Which sampler follows prompts in how few evaluations of the network? All of them, on the tiny world's captions.

python scripts/sampler_study.py            half an hour on 4 cores; stopped and started again, it goes on trial by trial

The pictures of every sampler at 4, 8, 16, 32 and 64 evaluations are judged by the reader, and then some that draw in
12, on more captions, beside PLMS in 50 steps. The output folder gets one JSON a trial, table.md and curves.png.
Evaluations are counted, not computed: what calls the network twice a step takes half as many steps. A trial is made
anew when anything that it depends on has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError
from ldm.samplers import SAMPLERS, SCHEDULES, steps_within, title_of

ROOT = Path(__file__).resolve().parents[1]
# What a trial's numbers depend on beside its settings.
FILES = tuple(
    f"ldm/{name}.py"
    for name in (
        "models/diffusion/sampling", "models/diffusion/karras", "models/diffusion/ddim",
        "models/diffusion/plms", "models/diffusion/dpm_solver/sampler", "models/diffusion/dpm_solver/solver",
        "models/diffusion/dpm_solver/spacing", "k_diffusion/sampling", "k_diffusion/dpmpp", "k_diffusion/dpm_solver",
        "k_diffusion/noise", "k_diffusion/named", "k_diffusion/schedules", "k_diffusion/steps", "k_diffusion/external",
        "modules/diffusionmodules/openaimodel", "data/shapes", "evaluation/shapes", "evaluation/prompt_following",
    )
)  # fmt: skip
# The diagrams, with PLMS in each of them for comparison.
PANELS = {
    "One evaluation a step": ("plms", "ddim", "euler", "lms", "dpm_solver", "dpmpp_2m"),
    "Several evaluations a step": ("plms", "heun", "dpm_2", "dpm_fast", "dpm_adaptive"),
    "Ancestral": ("plms", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"),
    "SDE": ("plms", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"),
}
FEW = 12
# Samplers, schedules and guidance that might draw in so few evaluations what PLMS does in 50 steps.
CANDIDATES = (
    *(("dpmpp_2m", schedule, 3.0) for schedule in SCHEDULES if schedule != "polyexponential"),
    ("dpmpp_2m", "karras", 2.0), ("dpmpp_2m", "karras", 4.0), ("ddim", None, 3.0), ("dpm_2", "karras", 3.0),
)  # fmt: skip
DECADES = 8.6  # about log(sigma_max / sigma_min) of the tiny model, for DPM adaptive's first step


@dataclass(frozen=True)
class Trial:
    """What is drawn, and how.

    Args:
        evaluations: at most so many; DPM adaptive is only led towards it.
        count: captions, one picture each.
    """

    sampler: str
    schedule: str | None
    scale: float
    evaluations: int
    count: int
    seed: int = 0
    solver: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, sampler: str, schedule: str | None, scale: float, evaluations: int, count: int, seed: int) -> Trial:
        """With the schedule where the sampler takes one, and tolerances for the one that finds its own steps."""
        schedule = schedule if SAMPLERS[sampler].scheduled else None
        solver = {}
        if SAMPLERS[sampler].evaluations is None:
            rtol = 0.05 * (27 / evaluations) ** 3
            solver = {"rtol": rtol, "atol": 0.156 * rtol, "h_init": DECADES * 3 / evaluations}
        return cls(sampler, schedule, scale, evaluations, count, seed, solver)

    @property
    def steps(self) -> int:
        """The most that keep to the evaluations. DDIM and PLMS may take a few more steps than they are told."""
        if self.sampler in ("ddim", "plms"):
            spare = 1 if self.sampler == "plms" else 0
            taken = {n: len(range(0, 1000, 1000 // n)) + spare for n in range(1, self.evaluations + 1)}
            return max((n for n, calls in taken.items() if calls <= self.evaluations), default=1)
        return steps_within(self.sampler, self.evaluations) or self.evaluations

    @property
    def title(self) -> str:
        return title_of(self.sampler, self.schedule) or "DPM-Solver++ 2M"

    def key(self, options: argparse.Namespace, machine: str) -> str:
        """A hash of everything that the numbers depend on."""
        digest = hashlib.sha256(json.dumps([asdict(self), self.steps, machine], sort_keys=True).encode())
        for path in (Path(options.config), Path(options.ckpt), *(ROOT / name for name in FILES)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Prompt accuracy of every sampler by evaluations of the network.")
    flag = parser.add_argument
    flag("--samplers", nargs="+", choices=list(SAMPLERS), default=[name for name in SAMPLERS if name != "lcm"],
         help="those of the curves; lcm, which takes 50 steps at most, is for few-step students")  # fmt: skip
    flag("--evaluations", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="points of the curves")
    flag("--schedule", choices=list(SCHEDULES), default="sgm_uniform", help="of the curves")
    flag("--scale", type=float, default=3.0, help="guidance scale of the curves; 1 for none")
    flag("--n", type=int, default=50, help="captions of every point of the curves")
    flag("--few_n", type=int, default=200, help="captions of the comparison in few evaluations; 0 leaves it out")
    flag("--seed", type=int, default=0, help="seed of the captions and of the first picture")
    flag("--batch_size", type=int, default=50, help="pictures at a time")
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--outdir", default="outputs/sampler_study", help="where trials, table and curves are kept")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    for name in ("n", "batch_size", "evaluations"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{name}: must be at least 1")
    if options.few_n < 0:
        raise UserError(f"--few_n {options.few_n}: must be 0 or more")
    for name in ("config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")


def curve_trials(options: argparse.Namespace) -> list[Trial]:
    """Those of the curves, the cheap ones first."""
    return [
        Trial.of(sampler, options.schedule, options.scale, evaluations, options.n, options.seed)
        for evaluations in sorted(options.evaluations)
        for sampler in options.samplers
    ]


def few_trials(options: argparse.Namespace) -> list[Trial]:
    """Those of the comparison in few evaluations; the first is PLMS in 50 steps, by which they are judged."""
    if not options.few_n:
        return []
    reference = Trial.of("plms", None, 3.0, 51, options.few_n, options.seed)
    return [reference, *(Trial.of(*which, FEW, options.few_n, options.seed) for which in CANDIDATES)]


class Bench:
    """The model, whose evaluations are counted."""

    def __init__(self, options: argparse.Namespace) -> None:
        from ldm.inference import load_model

        self.model = load_model(options.config, options.ckpt, options.device)
        self.batch_size = options.batch_size
        self.rows = 0
        apply_model = self.model.apply_model

        def counted(x: Any, t: Any, cond: Any = None) -> Any:
            self.rows += len(x)
            return apply_model(x, t, cond)

        self.model.apply_model = counted

    def run(self, trial: Trial) -> dict[str, Any]:
        """Accuracy, evaluations a picture, and seconds."""
        from ldm.evaluation.prompt_following import accuracy_of, evaluate
        from ldm.inference import txt2img

        def draw(captions: list[str], seeds: list[int]) -> list[Any]:
            pictures = txt2img(
                self.model, captions, seeds=seeds, sampler=trial.sampler, schedule=trial.schedule, scale=trial.scale,
                steps=trial.steps, solver=trial.solver, batch_size=self.batch_size, exact=False, progress=False,
            )  # fmt: skip
            return [picture.image for picture in pictures]

        self.rows, start = 0, time.perf_counter()
        judgements = evaluate(draw, trial.count, "test", trial.seed)
        return {
            "accuracy": accuracy_of(judgements),
            "calls": self.rows / trial.count / (1 if trial.scale == 1.0 else 2),
            "seconds": round(time.perf_counter() - start, 1),
        }


def run_all(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of both parts; those not yet there are made."""
    import torch

    from ldm.util import atomic_path, pick_device

    machine = f"{pick_device(options.device).type}, torch {torch.__version__}"
    few, curves = few_trials(options), curve_trials(options)
    bench, records = None, []
    for number, trial in enumerate([*curves, *few], 1):
        path = Path(options.outdir) / f"{trial.sampler}-{trial.evaluations}-{trial.key(options, machine)}.json"
        if path.is_file():
            records.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        bench = bench or Bench(options)
        record = {**asdict(trial), "steps": trial.steps, "title": trial.title, **bench.run(trial)}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        records.append(record)
        print(
            f"{number} of {len(curves) + len(few)}: {trial.title}, {record['calls']:g} evaluations: "
            f"{record['accuracy']['all']:.1%} right, {record['seconds']:.0f} s",
            flush=True,
        )
        report(records[: len(curves)], records[len(curves) :], options)
    return records[: len(curves)], records[len(curves) :]


def curve_table(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """A row a sampler, a column a number of evaluations, in Markdown."""
    columns = sorted({record["evaluations"] for record in records})
    error = 50 / math.sqrt(options.n)
    lines = [
        f"Pictures right in everything, %, of {options.n} captions of pairs never seen in training; guidance "
        f"{options.scale:g}, schedule {options.schedule}. A standard error is at most {error:.0f}. In brackets the "
        "evaluations of the network where they are not the column's.",
        "",
        "| evaluations | " + " | ".join(map(str, columns)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for sampler in dict.fromkeys(record["sampler"] for record in records):
        mine = {record["evaluations"]: record for record in records if record["sampler"] == sampler}
        cells = []
        for column in columns:
            record = mine.get(column)
            exact = record and abs(record["calls"] - column) < 0.05
            cells.append(f"{record['accuracy']['all']:.0%}".rstrip("%") if record else "")
            cells[-1] += "" if not record or exact else f" ({record['calls']:.0f})"
        lines.append(f"| {next(iter(mine.values()))['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def few_table(records: Sequence[dict[str, Any]]) -> str:
    """A row a way to draw in few evaluations, the best first, below the one that they are compared with."""
    lines = [
        f"The same, of {records[0]['count']} captions, for {FEW} evaluations:",
        "",
        "| sampler | steps | evaluations | guidance | right |",
        "|---|---|---|---|---|",
    ]
    for record in [records[0], *sorted(records[1:], key=lambda r: -r["accuracy"]["all"])]:
        lines.append(
            f"| {record['title']} | {record['steps']} | {record['calls']:.0f} | {record['scale']:g} "
            f"| {record['accuracy']['all']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def report(curves: Sequence[dict[str, Any]], few: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Write table.md and curves.png of what is there; the table's text."""
    from ldm.evaluation.plot import Panel, draw_panels
    from ldm.evaluation.records import write_table
    from ldm.modules.pictures import save_picture

    def curve(sampler: str) -> list[tuple[float, float]]:
        return sorted((r["calls"], r["accuracy"]["all"]) for r in curves if r["sampler"] == sampler)

    there = {record["sampler"]: SAMPLERS[record["sampler"]].title or record["title"] for record in curves}
    if curves:
        ends = min(record["calls"] for record in curves), max(record["calls"] for record in curves)
        shown = {title: {there[s]: [curve(s)] for s in names if s in there} for title, names in PANELS.items()}
        panels = [
            Panel(
                f"{title}: pictures right", "evaluations of the network", lines, percent=True, top=1.0, doublings=ends
            )
            for title, lines in shown.items()
            if lines
        ]
        save_picture(draw_panels(panels, columns=2), Path(options.outdir) / "curves.png")
    text = "\n".join([*([curve_table(curves, options)] if curves else []), *([few_table(few)] if few else [])])
    write_table(options.outdir, text)
    return text


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then write and print the tables."""
    options = parser().parse_args(argv)
    check(options)
    text = report(*run_all(options), options)
    print(f"\n{text}\nKept in {options.outdir}: table.md, curves.png, and a JSON file of each trial")


if __name__ == "__main__":
    cli.run(main)
