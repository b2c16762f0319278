"""Subjects for personalisation in the tiny world: toys of which its training shows random others, and no name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.captions import caption_path
from ldm.data.personalized_dream import INSTANCE_CAPTION
from ldm.data.shapes import BACKGROUNDS, COLOURS
from ldm.data.toys import WORLD, Outline, box, ellipse, paint
from ldm.errors import UserError

CLASS_WORD = "toy"


def _petals(first: int) -> list[Outline]:
    """Every second of six petals."""
    angles = [math.pi * i / 3 for i in range(first, 6, 2)]
    return [ellipse(0.62 * math.cos(a), 0.62 * math.sin(a), 0.38) for a in angles]


def _band(height: float) -> Outline:
    """The band of a ball, `height` from its equator to either side."""
    reach = math.asin(height)
    angles = [reach * (2 * i / 12 - 1) for i in range(13)]
    right = [(math.cos(a), math.sin(a)) for a in angles]
    return right + [(-x, -y) for x, y in right]


# A subject is a list of (outline in [-1, 1]^2, colour), painted in this order; y points down.
SUBJECTS: dict[str, list[tuple[Outline, str]]] = {
    "ball": [(ellipse(0, 0, 1), "blue"), (_band(0.4), "orange")],
    "flower": [
        *[(petal, "purple") for petal in _petals(0)],
        *[(petal, "pink") for petal in _petals(1)],
        (ellipse(0, 0, 0.4), "yellow"),
    ],
    "house": [
        (box(-0.74, -0.12, 0.74, 0.95), "yellow"),
        ([(0.0, -1.0), (1.0, -0.1), (-1.0, -0.1)], "red"),
        (box(-0.26, 0.3, 0.26, 0.95), "brown"),
    ],
}


def render_subject(
    name: str,
    background: str = "white",
    x: float = WORLD / 2,
    y: float = WORLD / 2,
    diameter: float = 42.0,
    angle: float = 0.0,
    size: int = WORLD,
) -> Image.Image:
    """A picture of a subject, `size` pixels a side.

    Args:
        name: one of `SUBJECTS`.
        background: one of the world's backgrounds.
        x, y, diameter: where and how large it is, in pixels of a picture of 64.
        angle: how far it is turned clockwise, in degrees.

    Raises:
        UserError: there is no such subject.
    """
    if name not in SUBJECTS:
        raise UserError(f"subject {name!r} is unknown; choose one of {', '.join(SUBJECTS)}")
    parts = [(outline, COLOURS[colour]) for outline, colour in SUBJECTS[name]]
    return paint(parts, BACKGROUNDS[background], x, y, diameter, angle, size)


def subject_views(
    name: str, n: int, seed: int = 0, backgrounds: Sequence[str] = tuple(BACKGROUNDS), size: int = WORLD
) -> list[Image.Image]:
    """`n` pictures of a subject on `backgrounds` in turn, at random places, sizes and small angles."""
    rng = np.random.default_rng(seed)
    views = []
    for i in range(n):
        x, y = WORLD / 2 + rng.uniform(-3, 3, size=2)
        diameter, angle = rng.uniform(40, 48), rng.uniform(-12, 12)
        views.append(render_subject(name, backgrounds[i % len(backgrounds)], x, y, diameter, angle, size))
    return views


def write_subject_photos(folder: str | Path, name: str, n: int = 5, seed: int = 0, size: int = 256) -> list[Path]:
    """Write `n` photos of a subject as `<name>-00.png` ..., and captions that name the background beside them as .txt.

    The last one gets no caption of its own, so that the bare name of the subject is learned as well.

    Args:
        folder: made if needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{i:02d}.png" for i in range(n)]
    for path, view in zip(paths, subject_views(name, n, seed, size=size), strict=True):
        view.save(path)
    for path, background in zip(paths[:-1], cycle(BACKGROUNDS), strict=False):
        caption = INSTANCE_CAPTION.format(CLASS_WORD)
        caption_path(path).write_text(f"{caption} on a {background} background\n", encoding="utf-8")
    return paths
