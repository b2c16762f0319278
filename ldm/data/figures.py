"""Random pictures and toys beside the tiny world's figures: who saw them in training can show new subjects as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4

Colour = tuple[int, int, int]
Point = tuple[float, float]
Content = tuple[list[Colour], str]  # what was drawn: its main colours, and what kind it is


@dataclass(frozen=True)
class Crayons:
    """What is drawn with: random numbers, and the colours that there are; none stands for all."""

    rng: np.random.Generator
    colours: Sequence[Colour] = ()
    stripes: tuple[float, float] = (3.0, 9.0)  # how wide stripes may be, in pixels of 64

    def pick(self, count: int) -> list[Colour]:
        """`count` random colours."""
        if self.colours:
            return [self.colours[i] for i in self.rng.permutation(len(self.colours))[:count]]
        return [tuple(int(value) for value in self.rng.integers(0, 256, size=3)) for _ in range(count)]


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


def _gradient(crayons: Crayons, side: int) -> Image.Image:
    """A linear gradient from one colour to another."""
    angle = crayons.rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side)
    along = np.clip(0.5 + axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle), 0, 1)[..., None]
    ends = np.array(crayons.pick(2), dtype=np.float64)
    return Image.fromarray((ends[0] + along * (ends[1] - ends[0])).astype(np.uint8))


def _stripes(crayons: Crayons, side: int) -> tuple[Image.Image, list[Colour], str]:
    """Stripes of two colours, or a chequerboard; the colours; "striped" or "chequered"."""
    rng, kind = crayons.rng, "striped"
    angle, width = rng.uniform(0, math.pi), rng.uniform(*crayons.stripes) * side / 64
    axis = np.arange(side)
    along = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    across = axis[:, None] * math.cos(angle) - axis[None, :] * math.sin(angle)
    second = np.floor(along / width).astype(int) % 2
    if rng.random() < 0.4:
        second ^= np.floor(across / width).astype(int) % 2
        kind = "chequered"
    colours = crayons.pick(2)
    return Image.fromarray(np.array(colours, dtype=np.uint8)[second]), colours, kind


def _some_figures(crayons: Crayons, canvas: Image.Image) -> Content:
    """Up to four figures, anywhere."""
    rng, side, draw, colours = crayons.rng, canvas.width, ImageDraw.Draw(canvas), []
    for _ in range(int(rng.integers(1, 5))):
        centre = tuple(rng.uniform(0.15 * side, 0.85 * side, size=2))
        radius = side * rng.uniform(0.08, 0.36)
        colours += crayons.pick(1)
        _figure(rng, draw, centre, radius, colours[-1])
    return colours, "scattered"


def _patterned(crayons: Crayons, canvas: Image.Image) -> Content:
    """One large figure filled with stripes or a chequerboard."""
    rng, side = crayons.rng, canvas.width
    window = Image.new("L", canvas.size)
    centre = tuple(rng.uniform(0.4 * side, 0.6 * side, size=2))
    _figure(rng, ImageDraw.Draw(window), centre, side * rng.uniform(0.2, 0.4), 255)
    stripes, colours, kind = _stripes(crayons, side)
    canvas.paste(stripes, mask=window)
    return colours, kind


def _toy(crayons: Crayons, canvas: Image.Image) -> Content:
    """A body with smaller parts on and around it."""
    rng, side, draw = crayons.rng, canvas.width, ImageDraw.Draw(canvas)
    centre, radius = rng.uniform(0.4 * side, 0.6 * side, size=2), side * rng.uniform(0.15, 0.3)
    colours = crayons.pick(3)
    _figure(rng, draw, tuple(centre), radius, colours[0])
    for _ in range(int(rng.integers(2, 8))):
        angle, distance = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.2, 1.1)
        place = (centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle))
        _figure(rng, draw, place, radius * rng.uniform(0.15, 0.45), colours[rng.integers(3)])
    return colours[:1], "jointed"


CONTENTS: tuple[Callable[[Crayons, Image.Image], Content], ...] = (_some_figures, _patterned, _toy)


def _shrunk(canvas: Image.Image) -> np.ndarray:
    size = canvas.width // SUPERSAMPLING
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32)


def random_picture(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A picture of anything that can be drawn with few lines: float32 [size, size, 3] in [0, 255]."""
    crayons, side = Crayons(rng), size * SUPERSAMPLING
    canvas = _gradient(crayons, side) if rng.random() < 0.3 else Image.new("RGB", (side, side), crayons.pick(1)[0])
    CONTENTS[rng.integers(len(CONTENTS))](crayons, canvas)
    return _shrunk(canvas)


def random_toy(
    rng: np.random.Generator, colours: Mapping[str, Colour], background: Colour, size: int = 64
) -> tuple[np.ndarray, str]:
    """A toy of two or three of `colours` on a plain background, and what it is in words.

    It is a figure with a pattern, or a body with smaller parts, never in the same place, size or make twice.

    Returns:
        The picture, float32 [size, size, 3] in [0, 255]; words such as "red and blue striped toy".
    """
    crayons = Crayons(rng, list(colours.values()), stripes=(4.0, 16.0))
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2, background)
    shown, kind = (_patterned if rng.random() < 0.5 else _toy)(crayons, canvas)
    names = {colour: name for name, colour in colours.items()}
    return _shrunk(canvas), f"{' and '.join(names[colour] for colour in shown)} {kind} toy"
