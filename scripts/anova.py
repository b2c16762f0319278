"""Which choice of an adapter matters most: input, output, form, size or scale? An analysis of variance.

python scripts/anova.py                    half an hour on 4 cores; stopped and started again, it goes on run by run

As in the paper (Xiang et al., 2023, arXiv:2303.18181), every placement is tuned on one subject, here of the tiny world,
several times, and the similarity of what is drawn to the photos is the response. The output folder gets a JSON file a
run, table.md with the analyses (statsmodels) and every placement's means, and effects.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

CENTRE = "attn2o", "ffni"  # the paper's choice, around which form, size and scale vary
PLACEMENTS = (
    "attn1i-attn1i", "attn1i-attn2i", "attn1i-ffni", "attn1i-transo", "attn1o-attn2i", "attn1o-ffni", "attn1o-transo",
    "attn2i-attn2i", "attn2i-ffni", "attn2i-transo", "attn2c-attn2c", "attn2o-ffni", "attn2o-transo", "ffni-ffni",
    "ffni-transo", "ffno-transo", "transo-transo", "resi-resi", "resi-reso", "reso-reso",
)  # fmt: skip
FORMS, SIZES, SCALES = ("relu", "sig", "silu", "ident"), (15, 60, 240), (0.5, 1.0, 2.0)
FORM, SIZE, SCALE = "relu", 60, 1.0
RESIDUAL_SIZE = 7  # about as many parameters as 60 in the transformer blocks have
RESPONSES = {"similarity_after": "similarity", "accuracy_change": "drift"}


@dataclass(frozen=True)
class Trial:
    """An adapter, and the seed of photos, prior images, training and pictures."""

    din: str
    dout: str
    form: str
    size: int
    scale: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.din}-{self.dout}-{self.form}-{self.size}-{self.scale:g}-{self.seed}"

    @property
    def words(self) -> list[str]:
        """What it changes in the yaml: both kinds of adapters are said, so that only one is there."""
        kinds = ["transformer_adp_config", "resblock_adp_config"]
        key = "model.params.unet_config.params.adapter_config"
        entry = f"din: {self.din}, dout: {self.dout}, method: {self.form}, mid_dim: {self.size}, scale: {self.scale}"
        mine = kinds[self.din.startswith("res")]
        return [f"{key}.{kind}={f'[{{{entry}}}]' if kind == mine else 'null'}" for kind in kinds]


def trials_of(options: argparse.Namespace) -> list[Trial]:
    """All placements, and around the paper's other forms, sizes and scales; seed by seed."""

    def one_seed(seed: int) -> Iterator[Trial]:
        for din, dout in (placement.split("-") for placement in options.placements):
            yield Trial(din, dout, FORM, RESIDUAL_SIZE if din.startswith("res") else SIZE, SCALE, seed)
        yield from (Trial(*CENTRE, form, SIZE, SCALE, seed) for form in options.forms)
        yield from (Trial(*CENTRE, FORM, size, SCALE, seed) for size in options.sizes)
        yield from (Trial(*CENTRE, FORM, SIZE, scale, seed) for scale in options.scales)

    return list(dict.fromkeys(trial for seed in options.seeds for trial in one_seed(seed)))


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Analyse which of an adapter's choices matters most, on the tiny model.")
    flag = parser.add_argument
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of photos, prior images, training and pictures")
    flag("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS), metavar="DIN-DOUT",
         help="input and output positions; all of the paper's 20")  # fmt: skip
    flag("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="activations of attn2o-ffni")
    flag("--sizes", nargs="*", type=int, default=list(SIZES), help="hidden widths of attn2o-ffni")
    flag("--scales", nargs="*", type=float, default=list(SCALES), help="strengths of attn2o-ffni")
    flag("--learning_rate", type=float, default=6e-3, help="of every run")
    flag("--subject", default="ball", help="ball, flower or house")
    flag("--steps", type=int, default=120, help="training steps of every run")
    flag("--prior_images", type=int, default=96, help="made by the untuned model, once a seed")
    flag("--pictures", type=int, default=20, help="of the subject, by which similarity is measured")
    flag("--others", type=int, default=40, help="other prompts, by which drift is measured")
    flag("--sampling_steps", type=int, default=12, help="steps a picture")
    flag("--processes", type=int, default=os.cpu_count() or 1, help="runs at once, one thread and about 1 GB each")
    flag("--base", default="configs/tiny/dreambooth.yaml", help="yaml of the training")
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--outdir", default="outputs/anova", help="where runs, table and diagrams are kept")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    for name in ("steps", "prior_images", "pictures", "others", "sampling_steps", "processes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if importlib.util.find_spec("statsmodels") is None:
        raise UserError("the analysis needs a package that is not installed: pip install statsmodels")
    if len(set(options.seeds)) < 2:
        raise UserError("--seeds: variance within a group needs at least two of them")
    if min(options.sizes, default=1) < 1:
        raise UserError(f"--sizes {min(options.sizes)}: must be at least 1")
    if not 0 < options.learning_rate < 1:
        raise UserError(f"--learning_rate {options.learning_rate:g}: must lie between 0 and 1")
    for name in ("base", "config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")


# ---- the runs -------------------------------------------------------------------------------------------------


def setting_of(options: argparse.Namespace) -> Any:
    """What all runs have in common."""
    from ldm.evaluation.subject_bench import Setting

    return Setting(**{name: getattr(options, name) for name in Setting.__dataclass_fields__})


def bench_of(options: argparse.Namespace, seed: int) -> Any:
    """A seed's photos, prior images and pictures of the untuned model; the work of a process."""
    from ldm.evaluation.subject_bench import Bench
    from ldm.evaluation.trials import bench_folder

    return Bench(setting_of(options), seed, bench_folder(options, seed))


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a record depends on."""
    return setting_of(options).record() | {"learning_rate": options.learning_rate}


def run(options: argparse.Namespace, trial: Trial, tell: Any) -> None:
    """Train, draw, measure, and keep the record; the work of a process, which tells its steps."""
    from ldm.evaluation.records import Records

    bench = bench_of(options, trial.seed)
    words = [f"model.base_learning_rate={options.learning_rate}", "lightning.trainer.logger=false", *trial.words]
    result = bench.train(f"{trial.name}-{os.getpid()}", words, tell=tell)
    numbers = bench.compare(bench.draw(result.files))
    shutil.rmtree(result.folder.parent)
    record = {**asdict(trial), **numbers, "parameters": result.trained, "seconds": round(result.seconds, 1)}
    Records(Path(options.outdir)).keep(trial.name, settings_of(options), record)


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every trial's record."""
    from ldm.evaluation.trials import run_trials

    return run_trials(dict.fromkeys(trials_of(options), settings_of(options)), bench_of, run, options)


# ---- the analysis ---------------------------------------------------------------------------------------------


def groups(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs in which one choice varies: the transformer placements, and around the centre form, size and scale."""
    usual = {"form": FORM, "size": SIZE, "scale": SCALE}

    def only(free: str) -> list[dict[str, Any]]:
        fixed = {"din": CENTRE[0], "dout": CENTRE[1]} | {k: v for k, v in usual.items() if k != free}
        return [r for r in records if all(r[key] == value for key, value in fixed.items())]

    placed = [r for r in records if not r["din"].startswith("res") and all(r[k] == v for k, v in usual.items())]
    return {"placement": placed} | {name: only(name) for name in usual}


def analyse(records: Sequence[dict[str, Any]], response: str) -> list[dict[str, Any]]:
    """An analysis of variance a factor: its degrees of freedom, share of the variance (eta squared), F and p.

    Input and output are each analysed alone, as the paper does, and then together: what the other explains is then
    taken out first (type II sums of squares), and the interaction is what the placements explain beyond both; these
    three are without the context's own adapter.
    """
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    by = groups(records)
    rows = []

    def add(name: str, table: Any, row: str, total: float) -> None:
        line = table.loc[row]
        share = float(line["sum_sq"]) / total if total else 0.0
        rows.append({"factor": name, "df": int(line["df"]), "share": share, "F": line["F"], "p": line["PR(>F)"]})

    def frame(group: str) -> tuple[Any, float]:
        data = pandas.DataFrame(by[group])[["din", "dout", "form", "size", "scale", response]]
        values = data[response]
        return data.assign(y=values), float(((values - values.mean()) ** 2).sum())

    def varies(group: str, *factors: str) -> bool:
        return all(len({r[factor] for r in by[group]}) > 1 for factor in factors)

    for name, factor in (("input", "din"), ("output", "dout")):
        if varies("placement", factor):
            data, total = frame("placement")
            add(name, anova_lm(ols(f"y ~ C({factor})", data).fit(), typ=2), f"C({factor})", total)
    if varies("placement", "din", "dout"):
        data, total = frame("placement")
        data = data[data["din"] != "attn2c"]  # a world of its own: nothing tells its input from its output
        alone = {factor: ols(f"y ~ C({factor})", data).fit() for factor in ("din", "dout")}
        both = ols("y ~ C(din) + C(dout)", data).fit()
        cells = ols("y ~ C(placement)", data.assign(placement=data["din"] + data["dout"])).fit()
        for name, less, more in (
            ("input, beyond the output", alone["dout"], both),
            ("output, beyond the input", alone["din"], both),
            ("interaction of both", both, cells),
        ):
            step = anova_lm(less, more).iloc[1]
            line = {"sum_sq": step["ss_diff"], "df": step["df_diff"], "F": step["F"], "PR(>F)": step["Pr(>F)"]}
            add(name, pandas.DataFrame([line], [name]), name, total)
    for name in ("form", "size", "scale"):
        if varies(name, name):
            data, total = frame(name)
            add(name, anova_lm(ols(f"y ~ C({name})", data).fit(), typ=2), f"C({name})", total)
    return rows


def table(records: Sequence[dict[str, Any]]) -> str:
    """The analyses, and the means of every adapter, in Markdown."""
    from ldm.evaluation.records import spread

    settings, seeds = records[0]["settings"], len({r["seed"] for r in records})
    lines = [
        f"{len(records)} runs of {settings['steps']} steps, learning rate {settings['learning_rate']:g}, {seeds} "
        f"seeds. Similarity of {settings['pictures']} pictures to the photos (untuned "
        f"{mean(r['similarity_before'] for r in records):.3f}, the photos among themselves "
        f"{mean(r['similarity_photos'] for r in records):.3f}); drift: points lost of the share of "
        f"{settings['others']} other prompts that are drawn right.",
        "",
        "| factor | df | similarity: variance explained | F | p | drift: variance explained | F | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one, other in zip(*(analyse(records, response) for response in RESPONSES), strict=True):
        cells = [f"{row['share']:.0%} | {row['F']:.1f} | {row['p']:.1g}" for row in (one, other)]
        lines.append(f"| {one['factor']} | {one['df']} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "| input | output | form | size | scale | parameters | similarity | drift, points |",
        "|---" * 8 + "|",
    ]
    keys = ("din", "dout", "form", "size", "scale")
    runs = {key: [r for r in records if tuple(r[k] for k in keys) == key] for key in
            dict.fromkeys(tuple(r[k] for k in keys) for r in records)}  # fmt: skip
    for key, mine in sorted(runs.items(), key=lambda item: -mean(r["similarity_after"] for r in item[1])):
        lines.append(
            f"| {' | '.join(str(k) for k in key)} | {mine[0]['parameters']:,} "
            f"| {spread([r['similarity_after'] for r in mine], '.3f')} "
            f"| {spread([0.0 - r['accuracy_change'] for r in mine], '.1f', 100)} |"
        )
    return "\n".join(lines) + "\n"


def diagrams(records: Sequence[dict[str, Any]]) -> Any:
    """Similarity by input, output, both (interaction), and by form, size and scale; None if there are no such runs."""
    from ldm.evaluation.plot import Panel, draw_panels

    by, seeds = groups(records), sorted({r["seed"] for r in records})
    placed = by["placement"]

    def dots(runs: Sequence[dict[str, Any]], factor: str, title: str) -> Panel:
        names = list(dict.fromkeys(r[factor] for r in runs))
        names = sorted(names) if isinstance(names[0], int | float) else names
        points = [[(names.index(r[factor]), r["similarity_after"]) for r in runs if r["seed"] == s] for s in seeds]
        return Panel(f"Similarity by {title}", title, {"": points}, names=[f"{n}" for n in names], joined=False)

    panels = [dots(by[name], name, f"{name} of {'-'.join(CENTRE)}") for name in ("form", "size", "scale") if by[name]]
    if placed:
        names = list(dict.fromkeys(r["dout"] for r in placed))
        lines = {
            din: [[(names.index(r["dout"]), r["similarity_after"]) for r in placed if r["din"] == din]]
            for din in dict.fromkeys(r["din"] for r in placed)
        }
        both = Panel("Interaction: a line an input", "output", lines, names=names)
        panels = [dots(placed, "din", "input"), dots(placed, "dout", "output"), both, *panels]
    return draw_panels(panels, columns=3) if panels else None


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then analyse."""
    options = parser().parse_args(argv)
    check(options)
    setting_of(options).prompts()  # a UserError where they cannot be
    from ldm.data.subjects import render_subject
    from ldm.evaluation.records import write_table
    from ldm.modules.pictures import save_picture

    render_subject(options.subject)  # likewise
    records = run_all(options)
    picture = diagrams(records)
    if picture:
        save_picture(picture, Path(options.outdir) / "effects.png")
    text = table(records)
    write_table(options.outdir, text)
    print(f"\n{text}\nKept in {options.outdir}: table.md, effects.png, and a JSON file of each run")


if __name__ == "__main__":
    cli.run(main)
