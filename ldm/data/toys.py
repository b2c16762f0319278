"""Toys of the tiny world: things of two colours, a body and a mark on it. Its training shows many, and says which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw

WORLD = 64  # the side of the picture that lengths here refer to, in pixels
SUPERSAMPLING = 8

Colour = tuple[int, int, int]
Outline = list[tuple[float, float]]  # corners in [-1, 1]^2; y points down


def ellipse(x: float, y: float, width: float, height: float | None = None) -> Outline:
    """The outline of an ellipse with the given centre and half axes."""
    height = width if height is None else height
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """The outline of a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> Outline:
    radii, angles = (1.0, 0.5), [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


BODIES = {
    "round": ellipse(0, 0, 1),
    "square": box(-0.88, -0.88, 0.88, 0.88),
    "triangular": [(0.0, -0.92), (1.0, 0.86), (-1.0, 0.86)],
    "star-shaped": _star(),
}
MARKS = ("band", "spot", "base")
UNSEEN = ("round", "blue", "orange", "band")  # what training does not show: a subject for tuning


def _mark(kind: str, size: float) -> Outline:
    """The outline of a mark of `size` in [0, 1]; what of it lies beside the body is not painted."""
    if kind == "band":
        half = 0.25 + 0.2 * size
        return box(-1, -half, 1, half)
    if kind == "spot":
        return ellipse(0, 0.1, 0.35 + 0.2 * size)
    return box(-1, 0.1 + 0.2 * size, 1, 1)


def paint(
    parts: Sequence[tuple[Outline, Colour]],
    background: Colour,
    x: float = WORLD / 2,
    y: float = WORLD / 2,
    diameter: float = 42.0,
    angle: float = 0.0,
    size: int = WORLD,
    inside: bool = False,
) -> Image.Image:
    """A picture, `size` pixels a side, of a thing made of `parts`, painted in this order.

    Args:
        x, y, diameter: where and how large it is, in pixels of a picture of 64.
        angle: how far it is turned clockwise, in degrees.
        inside: of all other parts, paint only what lies on the first.
    """
    scale = size * SUPERSAMPLING / WORLD
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2, background)
    body = None
    for outline, colour in parts:
        turned = [(px * cos - py * sin, px * sin + py * cos) for px, py in outline]
        corners = [(scale * (x + diameter / 2 * px), scale * (y + diameter / 2 * py)) for px, py in turned]
        covered = Image.new("1", canvas.size)
        ImageDraw.Draw(covered).polygon(corners, fill=1)
        if inside and body is not None:
            covered = ImageChops.logical_and(covered, body)
        body = body or covered
        canvas.paste(colour, mask=covered)
    return canvas.resize((size, size), Image.Resampling.BOX)


def random_toy(
    rng: np.random.Generator, colours: Mapping[str, Colour], background: Colour, size: int = WORLD
) -> tuple[np.ndarray, str]:
    """A random toy at about the middle of the picture, a little turned, and what it is in words; never `UNSEEN`.

    Args:
        colours: by name, those that it may have.

    Returns:
        The picture, float32 [size, size, 3] in [0, 255]; words such as "round blue toy with a red band".
    """
    toy = UNSEEN
    while toy == UNSEEN:
        body, mark = rng.choice(list(BODIES)), rng.choice(MARKS)
        first, second = rng.choice(list(colours), 2, replace=False)
        toy = (str(body), str(first), str(second), str(mark))
    parts = [(BODIES[body], colours[first]), (_mark(mark, rng.random()), colours[second])]
    x, y = WORLD / 2 + rng.uniform(-4, 4, size=2)
    picture = paint(parts, background, x, y, rng.uniform(36, 48), rng.uniform(-15, 15), size, inside=True)
    article = "an" if second == "orange" else "a"
    return np.asarray(picture, dtype=np.float32), f"{body} {first} toy with {article} {second} {mark}"
