"""Curves as a picture, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.sheet import GREY, INK, RULE

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 400, 64, 24, 48, 76
PALETTE = ((66, 66, 72), (25, 103, 210), (217, 83, 25), (30, 142, 62), (161, 66, 191), (214, 158, 10))
SCALE = 3  # drawn larger and then shrunk, for smooth lines


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Args:
        curves: name -> runs of the same x, each a list of (x, y): a thin line a run, and a thick one for their mean.
        percent: label the y axis in percent.
        top: how far the y axis reaches; by default to the highest point.
        doublings: the x axis has the powers of 2 around these two numbers, evenly apart, and every point is a dot.
    """

    title: str
    x_label: str
    curves: dict[str, Sequence[Sequence[tuple[float, float]]]]
    percent: bool = False
    top: float | None = None
    doublings: tuple[float, float] | None = None


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high], in equal steps."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / about))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def average(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several runs of the same x."""
    return [(points[0][0], mean(y for _, y in points)) for points in zip(*runs, strict=True)]


def draw_panels(panels: Sequence[Panel], columns: int | None = None) -> Image.Image:
    """Diagrams side by side, in rows of `columns` or all in one."""
    columns = min(columns or len(panels), len(panels))
    sheet = Image.new("RGB", (WIDTH * columns, HEIGHT * -(-len(panels) // columns)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(_draw(panel), (i % columns * WIDTH, i // columns * HEIGHT))
    return sheet


def doublings(low: float, high: float) -> list[float]:
    """Powers of 2 that cover [low, high], for low above 0."""
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    return [2.0**i for i in range(first, max(last, first + 1) + 1)]


def _draw(panel: Panel) -> Image.Image:
    points = [point for runs in panel.curves.values() for run in runs for point in run]
    xs = doublings(*panel.doublings) if panel.doublings else ticks(0, max(x for x, _ in points))
    ys = ticks(min(0, *(y for _, y in points)), panel.top or max(y for _, y in points))
    scale = math.log2 if panel.doublings else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (scale(x) - scale(xs[0])) / (scale(xs[-1]) - scale(xs[0])) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    lines = ImageDraw.Draw(canvas)

    def line(run: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: int) -> None:
        lines.line([tuple(SCALE * v for v in place(*point)) for point in run], colour, width, joint="curve")

    for y in ys:
        line([(xs[0], y), (xs[-1], y)], RULE, SCALE)
    for runs, colour in zip(panel.curves.values(), PALETTE, strict=False):
        for run in runs if len(runs) > 1 else ():
            line(run, tuple((255 + c) // 2 for c in colour), SCALE)
    for runs, colour in zip(panel.curves.values(), PALETTE, strict=False):
        line(average(runs), colour, 3 * SCALE)
        for point in average(runs) if panel.doublings else ():
            lines.circle([SCALE * v for v in place(*point)], 5 * SCALE, colour)
    picture = canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    _label(ImageDraw.Draw(picture), panel, xs, ys, place)
    return picture


def _label(draw: ImageDraw.ImageDraw, panel: Panel, xs: list[float], ys: list[float], place: Callable) -> None:
    big, small = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    draw.text((LEFT, 14), panel.title, INK, big)
    for y in ys:
        draw.text((LEFT - 8, place(xs[0], y)[1]), f"{y:.0%}" if panel.percent else f"{y:g}", GREY, small, anchor="rm")
    for x in xs:
        draw.text((place(x, ys[0])[0], HEIGHT - BOTTOM + 6), f"{x:g}", GREY, small, anchor="ma")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 24), panel.x_label, GREY, small, anchor="ma")
    widths = [52 + draw.textlength(name, font=small) for name in panel.curves]
    in_two = sum(widths) > WIDTH - LEFT  # then the names go on below
    across, down = LEFT, HEIGHT - (28 if in_two else 18)
    for name, width, colour in zip(panel.curves, widths, PALETTE, strict=False):
        if across + width > WIDTH + 24:
            across, down = LEFT, down + 18
        draw.line([across, down, across + 22, down], colour, 3)
        draw.text((across + 28, down), name, INK, small, anchor="lm")
        across += width
