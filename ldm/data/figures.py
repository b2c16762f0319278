"""Random pictures beside the tiny world's: an autoencoder that saw them can show new subjects as well."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4

Colour = tuple[int, int, int]
Point = tuple[float, float]


def _colour(rng: np.random.Generator) -> Colour:
    return tuple(int(value) for value in rng.integers(0, 256, size=3))


def _polygon(rng: np.random.Generator, centre: Point, radius: float) -> list[Point]:
    """A regular polygon or a star with 3 to 8 tips, turned at random."""
    tips, turn = int(rng.integers(3, 9)), rng.uniform(0, 2 * math.pi)
    inner = rng.uniform(0.35, 0.7) if rng.random() < 0.4 else math.cos(math.pi / tips)
    angles = [turn + math.pi * i / tips for i in range(2 * tips)]
    radii = [radius if i % 2 == 0 else radius * inner for i in range(2 * tips)]
    return [(centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _figure(rng: np.random.Generator, draw: ImageDraw.ImageDraw, centre: Point, radius: float, fill: object) -> None:
    """One filled polygon, ellipse or ring."""
    kind = rng.random()
    if kind < 0.55:
        draw.polygon(_polygon(rng, centre, radius), fill=fill)
        return
    width, height = radius * rng.uniform(0.5, 1.0), radius * rng.uniform(0.5, 1.0)
    box = [centre[0] - width, centre[1] - height, centre[0] + width, centre[1] + height]
    if kind < 0.85:
        draw.ellipse(box, fill=fill)
    else:
        draw.ellipse(box, outline=fill, width=max(1, int(radius * rng.uniform(0.15, 0.5))))


def _gradient(rng: np.random.Generator, side: int) -> Image.Image:
    """A linear gradient from one colour to another."""
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side)
    along = np.clip(0.5 + axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle), 0, 1)[..., None]
    ends = np.array([_colour(rng), _colour(rng)], dtype=np.float64)
    return Image.fromarray((ends[0] + along * (ends[1] - ends[0])).astype(np.uint8))


def _stripes(rng: np.random.Generator, side: int) -> Image.Image:
    """Stripes of two colours, or a chequerboard, 3 to 9 pixels (of 64) wide."""
    angle, width = rng.uniform(0, math.pi), rng.uniform(3, 9) * side / 64
    axis = np.arange(side)
    along = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    across = axis[:, None] * math.cos(angle) - axis[None, :] * math.sin(angle)
    second = np.floor(along / width).astype(int) % 2
    if rng.random() < 0.4:
        second ^= np.floor(across / width).astype(int) % 2
    return Image.fromarray(np.array([_colour(rng), _colour(rng)], dtype=np.uint8)[second])


def _some_figures(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Up to four figures, anywhere."""
    side, draw = canvas.width, ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 5))):
        centre = tuple(rng.uniform(0.15 * side, 0.85 * side, size=2))
        _figure(rng, draw, centre, side * rng.uniform(0.08, 0.36), _colour(rng))


def _patterned(rng: np.random.Generator, canvas: Image.Image) -> None:
    """One large figure filled with stripes or a chequerboard."""
    side = canvas.width
    window = Image.new("L", canvas.size)
    centre = tuple(rng.uniform(0.4 * side, 0.6 * side, size=2))
    _figure(rng, ImageDraw.Draw(window), centre, side * rng.uniform(0.2, 0.4), 255)
    canvas.paste(_stripes(rng, side), mask=window)


def _toy(rng: np.random.Generator, canvas: Image.Image) -> None:
    """A body with smaller parts on and around it."""
    side, draw = canvas.width, ImageDraw.Draw(canvas)
    centre, radius = rng.uniform(0.4 * side, 0.6 * side, size=2), side * rng.uniform(0.15, 0.3)
    colours = [_colour(rng) for _ in range(3)]
    _figure(rng, draw, tuple(centre), radius, colours[0])
    for _ in range(int(rng.integers(2, 8))):
        angle, distance = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.2, 1.1)
        place = (centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle))
        _figure(rng, draw, place, radius * rng.uniform(0.15, 0.45), colours[rng.integers(3)])


CONTENTS: tuple[Callable[[np.random.Generator, Image.Image], None], ...] = (_some_figures, _patterned, _toy)


def random_picture(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A picture of anything that can be drawn with few lines: float32 [size, size, 3] in [0, 255]."""
    side = size * SUPERSAMPLING
    canvas = _gradient(rng, side) if rng.random() < 0.3 else Image.new("RGB", (side, side), _colour(rng))
    CONTENTS[rng.integers(len(CONTENTS))](rng, canvas)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
