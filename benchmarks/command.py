"""The command line that every row of the benchmark has, and the tables that it prints."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.side_by_side import Result, Row, Settings, alone, measure
from ldm import cli
from ldm.errors import UserError

Rows = Callable[[Settings], list[Row]]
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def parser(description: str) -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--size", choices=("full", "tiny"), default="full",
         help="Stable Diffusion v1's size, or a very small model: the same code, to see that it runs")  # fmt: skip
    flag("--device", default="cpu", help="cpu (float32), or cuda (bf16)")
    flag("--rounds", type=int, help="turns of each side (when not given, each row's own number)")
    flag("--rows", nargs="+", metavar="NAME", help="only these")
    flag("--count", action="store_true", help="count operations instead of taking times: the same on any machine")
    flag("--profile", action="store_true", help="say in which operations each side spends its time, instead")
    flag("--folder", help="where the random weights are written, and kept (default: a temporary folder)")
    flag(
        "--write", metavar="FILE", help="also write the tables there; a README's part between its two marks is replaced"
    )
    return parser


def run_rows(rows: Rows, argv: Sequence[str], description: str | None) -> None:
    """Parse the flags, measure row by row, print and write the tables."""
    options = parser(description or "").parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(options.size, options.device, Path(options.folder or temporary).resolve())
        chosen = choose(rows(settings), options.rows)
        if options.rounds is not None and options.rounds < 1:
            raise UserError("--rounds must be at least 1")
        if options.write and not Path(options.write).resolve().parent.is_dir():
            raise UserError(f"--write: there is no folder '{Path(options.write).parent}'")
        from ldm.util import pick_device

        pick_device(options.device)
        said = head(settings)
        print("\n".join(said), flush=True)
        if options.profile:
            print("\n".join(line for row in chosen for line in profile_lines(row, settings)))
            return
        results, rates = [], []
        for row in chosen:
            if not options.count:
                rates.append(machine.rates(options.device, rate_dtype(settings)))
            results.append(measure(row, settings, 0 if options.count else options.rounds))
            print("\n".join((count_lines if options.count else lines)(results[-1])), flush=True)
        limits = [] if options.count else ["", *limits_table(results, settings, rates)]
        table = counts_table(results) if options.count else [*times_table(results), *limits]
        print("", *table, sep="\n")
        if options.write:
            write(Path(options.write), [*said, "", *table])


def choose(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """The rows with these names, or all that need not be asked for.

    Raises:
        UserError: there is no such row.
    """
    known = [row.name for row in rows]
    for name in names or ():
        if name not in known:
            raise UserError(f"--rows: '{name}' is none of {', '.join(known)}")
    return [row for row in rows if (row.name in names if names else not row.asked)]


def head(settings: Settings) -> list[str]:
    """What stands above the tables: machine, versions, size, and whether the machine is busy."""
    size = "Stable Diffusion v1" if settings.full else "a tiny model, whose times say nothing of a large one's"
    said = [f"Measured on: {machine.describe(settings.device)}; {size}, random weights."]
    if machine.load() > machine.BUSY:
        said.append(f"**Other programs are running (load {machine.load():.1f} a core): these times do not count.**")
    return said


# ---- tables ---------------------------------------------------------------------------------------------------


def lines(result: Result) -> list[str]:
    """A row as soon as it is measured."""
    ratio, low, high = result.ratios()
    return [f"{result.row.name}: {ratio:.2f} ({low:.2f} to {high:.2f}) of {result.row.theirs.name}"]


def count_lines(result: Result) -> list[str]:
    """The same where operations are counted."""
    ours, theirs = result.counts
    return [f"{result.row.name}: {ours.flops / max(theirs.flops, 1):.3f} of the operations"]


def profile_lines(row: Row, settings: Settings, operations: int = 10) -> list[str]:
    """Each side's dearest operations."""
    if row.prepare is not None:
        row.prepare(settings)
    out = []
    for way in (row.ours, row.theirs):
        (found,) = alone(way, settings, "profile")
        out += ["", f"{row.name}, {way.name}"]
        out += [f"  {share:5.1%}  {name} ({calls} calls)" for name, share, calls in found[:operations]]
    return out


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    unit, factor = ("s", 1) if value >= 1 else ("ms", 1e3)
    return f"{value * factor:#.3g}".rstrip(".") + f" {unit}"


def amount(value: float) -> str:
    """Bytes, likewise; nothing for NaN, which was not measured."""
    if math.isnan(value):
        return ""
    unit, factor = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
    return f"{value / factor:.3g} {unit}"


def against(ratio: float, bar: float | None) -> str:
    """A ratio, and the bar when it is missed; nothing for NaN."""
    if math.isnan(ratio):
        return ""
    return f"{ratio:.2f}" + (f" (bar {bar:g})" if bar is not None and ratio > bar else "")


def times_table(results: Sequence[Result]) -> list[str]:
    """Medians, ratios and their spread, peak memory, in Markdown."""
    out = [
        "| row | what | beside | here | there | ratio | spread | memory here | there | ratio | results differ by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        row, (ours, theirs), (ratio, low, high) = result.row, result.medians(), result.ratios()
        room = result.memory()
        apart = "" if result.difference is None else f"{result.difference:.0e}"
        cells = [
            row.name, row.title, row.theirs.name, seconds(ours), seconds(theirs), against(ratio, row.bar),
            f"{low:.2f} to {high:.2f}", amount(room[0]), amount(room[1]),
            against(room[0] / max(room[1], 1), row.memory_bar), apart,
        ]  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    return out


def rate_dtype(settings: Settings) -> str:
    """The number format in which the machine's rate counts."""
    return "float32" if settings.device == "cpu" else "bfloat16"


def limits_table(results: Sequence[Result], settings: Settings, rates: Sequence[tuple[float, float]]) -> list[str]:
    """What each job must compute and read at least, beside the machine's measured rates, and the share reached.

    Args:
        rates: measured before every row; the best count, for a slow moment of the machine must not lower the limit.
    """
    compute, stream = (max(rate) for rate in zip(*rates, strict=True))
    side = machine.side_of(settings.device)
    out = [
        f"Limits: a {side}x{side} product in {rate_dtype(settings)} runs at {compute / 1e9:,.0f} GFLOP/s, a copy at "
        f"{stream / 1e9:,.0f} GB/s.",
        "",
        "| row | GFLOP here | there | GB at least | time at these rates | reached here | there |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours, theirs = result.counts
        if not ours.flops:
            continue
        least = max(ours.flops / compute, ours.least_bytes / stream)
        reached = " | ".join(f"{least / time:.0%}" for time in result.medians())
        out.append(
            f"| {result.row.name} | {ours.flops / 1e9:,.1f} | {theirs.flops / 1e9:,.1f} | {ours.least_bytes / 1e9:.2f} "
            f"| {seconds(least)} | {reached} |"
        )
    return out


def counts_table(results: Sequence[Result]) -> list[str]:
    """The operations of one run, here and there."""
    out = [
        "| row | GFLOP | calls | copies | MB copied | in float64 | waits |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        a, b = result.counts
        pairs = [(a.calls, b.calls), (a.copies, b.copies), (a.copied // 10**6, b.copied // 10**6),
                 (a.float64, b.float64), (a.waits, b.waits)]  # fmt: skip
        cells = [result.row.name, f"{a.flops / 1e9:.3f} / {b.flops / 1e9:.3f}", *(f"{x:,} / {y:,}" for x, y in pairs)]
        out.append(f"| {' | '.join(cells)} |")
    return ["Here / there, one run:", "", *out]


def write(path: Path, table: Sequence[str]) -> None:
    """The tables as a file, or in place of what stands between the two marks in it."""
    from ldm.util import atomic_path

    text = "\n".join(table) + "\n"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BEGIN in old and END in old:
        before, _, rest = old.partition(BEGIN)
        text = f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
