"""Results of a study as a picture: curves, a thin line a run and a thick one for their mean, or points in a plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from PIL import Image

PALETTE = ("#424248", "#1967d2", "#d95319", "#1e8e3e", "#a142bf", "#d69e0a", "#12858f", "#c2185b")
MARKERS = "osD^vPX*<>ph"
SIZE = 5.6, 4.2  # inches a panel, at 100 pixels each


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Args:
        curves: name -> runs of the same x, each a list of (x, y).
        percent: label the y axis in percent.
        top: how far the y axis reaches; by default to the highest point.
        doublings: the x axis is logarithmic, with the powers of 2 within these two numbers, and every mean is a dot.
        names: what stands at x = 0, 1, ...: then runs are dots, and no line joins them, unless `joined`.
    """

    title: str
    x_label: str
    curves: dict[str, Sequence[Sequence[tuple[float, float]]]]
    percent: bool = False
    top: float | None = None
    doublings: tuple[float, float] | None = None
    names: Sequence[str] = ()
    joined: bool = True


def average(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several runs at every x that any of them has."""
    values: dict[float, list[float]] = {}
    for x, y in (point for run in runs for point in run):
        values.setdefault(x, []).append(y)
    return [(x, mean(ys)) for x, ys in sorted(values.items())]


def draw_panels(panels: Sequence[Panel], columns: int | None = None) -> Image.Image:
    """Diagrams side by side, in rows of `columns` or all in one."""
    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(SIZE[0] * columns, SIZE[1] * rows)
    for place, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(rows, columns, place), panel)
    return _picture(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _picture(figure: Any) -> Image.Image:
    import numpy as np

    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    dots = bool(panel.doublings or panel.names)
    for (name, runs), colour in zip(panel.curves.items(), PALETTE, strict=False):
        for run in runs if len(runs) > 1 else ():
            style = {"marker": ".", "linestyle": "none"} if panel.names else {"linewidth": 0.8}
            axes.plot(*zip(*run, strict=True), color=colour, alpha=0.45, **style)
        style = {"marker": "o" if dots else "", "markersize": 5}
        if not panel.joined:
            style = {"linestyle": "none", "marker": "_", "markersize": 18, "markeredgewidth": 2.2}
        axes.plot(*zip(*average(runs), strict=True), color=colour, linewidth=2.2, label=name, **style)
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dadce0", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    low = min(0.0, axes.dataLim.y0) if not panel.names else None
    axes.set_ylim(bottom=low, top=panel.top and 1.02 * panel.top)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if panel.doublings:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    elif all(float(x).is_integer() for runs in panel.curves.values() for run in runs for x, _ in run):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if panel.names:
        axes.set_xticks(range(len(panel.names)), panel.names, rotation=30 if len(panel.names) > 5 else 0)
        axes.set_xlim(-0.5, len(panel.names) - 0.5)
    if len(panel.curves) > 1:
        axes.legend(fontsize=8, frameon=False)


def draw_points(
    points: dict[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str, most_x: float
) -> Image.Image:
    """A plane with a marker a name at the mean of its points, bars for their deviations, and a small dot for each.

    Args:
        most_x: what lies right of it is shaded, as too much.
    """
    figure = _figure(1.5 * SIZE[0], 1.25 * SIZE[1])
    axes = figure.add_subplot()
    for i, (name, places) in enumerate(points.items()):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        columns = list(zip(*places, strict=True))
        bars = [stdev(values) if len(values) > 1 else 0.0 for values in columns]
        axes.plot(*columns, color=colour, alpha=0.5, marker=".", markersize=4, linestyle="none")
        axes.errorbar(*map(mean, columns), bars[1], bars[0], color=colour, elinewidth=0.8, capsize=2, marker=marker,
                      markersize=8, markeredgecolor="white", linestyle="none", label=name)  # fmt: skip
    low, high = axes.get_xlim()
    high = max(high, 1.1 * most_x)
    axes.axvspan(most_x, high, color="#f1f3f4", zorder=0)
    axes.set_xlim(min(low, -0.03 * high), high)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dadce0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _picture(figure)
