"""The tiny world: captioned 64x64 pictures of one figure on a plain background.

Every picture is a function of a `Scene`, and every scene has one caption, so that `ldm.evaluation.shapes` can
read a picture back and say whether it shows what its caption says. A fixed set of shape-colour pairs is never
trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.figures import random_picture
from ldm.data.toys import SUPERSAMPLING, WORLD, random_toy
from ldm.errors import UserError

COLOURS = {
    "red": (214, 28, 38),
    "orange": (250, 130, 16),
    "yellow": (250, 226, 40),
    "green": (28, 158, 62),
    "blue": (28, 72, 216),
    "purple": (128, 44, 172),
    "pink": (255, 140, 196),
    "brown": (112, 62, 24),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (14, 14, 18),
    "grey": (144, 144, 148),
    "cyan": (136, 224, 236),
}
SIZES = {"small": 22.0, "large": 42.0}  # pixels across in a picture of 64
JITTER = 4  # how far a figure's centre may lie from the picture's, in pixels of 64


def _regular(points: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """Corners on circles of the given radii in turn, the first one straight up."""
    angles = [2 * math.pi * i / points - math.pi / 2 for i in range(points)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


# Outlines in the square [-1, 1]^2, y downwards; circle and ring are drawn as ellipses instead.
POLYGONS = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.92), (1.0, 0.86), (-1.0, 0.86)],
    "cross": [
        *[(-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33)],
        *[(0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33)],
    ],
    "star": [(1.08 * x, 1.08 * y + 0.08) for x, y in _regular(10, (1.0, 0.44))],
}
ELLIPSES = {"circle": (1.0,), "ring": (1.0, 0.56)}  # the outer radius, then that of the hole
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")

# Shape-colour pairs that training never shows: every shape and every colour once or twice.
HELD_OUT = frozenset(
    [
        *[("circle", "purple"), ("circle", "orange"), ("square", "red"), ("square", "pink")],
        *[("triangle", "blue"), ("triangle", "brown"), ("cross", "yellow"), ("ring", "green")],
        *[("star", "red"), ("star", "blue")],
    ]
)
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
SPLITS = {
    "train": tuple(pair for pair in PAIRS if pair not in HELD_OUT),
    "validation": tuple(pair for pair in PAIRS if pair not in HELD_OUT),
    "test": tuple(pair for pair in PAIRS if pair in HELD_OUT),
    "all": PAIRS,
}
# A tenth of the training captions leave something out or say it differently.
OTHER_CAPTIONS = (
    "a photo of a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape}",
    "a {colour} {shape} on a {background} background",
    "a photo of a {colour} {shape}",
)
# What has two colours is a toy: {toy} says more of it, such as "round blue toy with a red band".
TOY_CAPTIONS = (
    "a photo of a {toy} on a {background} background",
    "a {toy} on a {background} background",
    "a photo of a toy on a {background} background",
    "a photo of a toy",
)


@dataclass(frozen=True)
class Scene:
    """One figure on a background; `x` and `y` are its centre in pixels of a picture 64 wide."""

    shape: str
    colour: str
    size: str
    background: str
    x: float = WORLD / 2
    y: float = WORLD / 2

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


@lru_cache(maxsize=4096)
def mask(shape: str, diameter: float, x: float, y: float, size: int = WORLD) -> np.ndarray:
    """How much of each pixel a figure covers: float32 [size, size] in [0, 1]; lengths are in pixels of 64."""
    scale = size / WORLD * SUPERSAMPLING
    radius = diameter / 2 * scale
    canvas = Image.new("L", (size * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    centre_x, centre_y = x * scale, y * scale
    for value, part in zip((255, 0), ELLIPSES.get(shape, ()), strict=False):
        r = part * radius
        draw.ellipse([centre_x - r, centre_y - r, centre_x + r, centre_y + r], fill=value)
    if shape in POLYGONS:
        draw.polygon([(centre_x + px * radius, centre_y + py * radius) for px, py in POLYGONS[shape]], fill=255)
    covered = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    covered.flags.writeable = False
    return covered


def render_array(scene: Scene, size: int = WORLD) -> np.ndarray:
    """The picture of a scene: float32 [size, size, 3] in [0, 255]."""
    covered = mask(scene.shape, SIZES[scene.size], scene.x, scene.y, size)[..., None]
    background = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    return background + covered * (np.asarray(COLOURS[scene.colour], dtype=np.float32) - background)


def render(scene: Scene, size: int = WORLD) -> Image.Image:
    """The picture of a scene, `size` pixels wide and high."""
    return Image.fromarray(render_array(scene, size).round().astype(np.uint8))


def random_scene(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...] = PAIRS) -> Scene:
    """A scene whose shape and colour are one of `pairs`; everything else is drawn evenly."""
    shape, colour = pairs[rng.integers(len(pairs))]
    x, y = WORLD / 2 + rng.integers(-JITTER, JITTER + 1, size=2)
    size, background = rng.choice(list(SIZES)), rng.choice(list(BACKGROUNDS))
    return Scene(shape, colour, str(size), str(background), float(x), float(y))


class ShapesDataset:
    """Captioned pictures of the tiny world; item `i` depends on (seed, split, i) alone.

    Items are dict(image=float32 [size, size, 3] in [-1, 1], caption=str). "train" and "validation" draw from
    the pairs that are not held out, "test" only from those that are, "all" from both.

    Args:
        split: train, validation, test or all. size: pixels a side. length: how many pictures. seed: of all of them.
        variety: three in ten pictures show something else (stripes, several figures, gradients, things of parts), for
            an autoencoder that is to show new subjects too.
        toys: the share of pictures that show a random toy of the world's colours, on one of its backgrounds, and say
            so; a model that saw them can be taught new ones.

    Raises:
        UserError: a parameter is out of its range.
    """

    VARIETY = 0.3
    OTHER_CAPTION = 0.1

    def __init__(
        self,
        split: str = "train",
        size: int = WORLD,
        length: int = 12000,
        seed: int = 0,
        variety: bool = False,
        toys: float = 0.0,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"ShapesDataset: split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if not 0 <= toys <= 1:
            raise UserError(f"ShapesDataset: toys is {toys}; it must lie between 0 and 1")
        self.split, self.size, self.length, self.seed = split, size, length, seed
        self.variety, self.toys = variety, toys

    def __len__(self) -> int:
        return self.length

    def _draw(self, index: int) -> tuple[np.random.Generator, Scene]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of {self.length}")
        rng = np.random.default_rng([self.seed, list(SPLITS).index(self.split), index])
        return rng, random_scene(rng, SPLITS[self.split])

    def scene(self, index: int) -> Scene:
        """The scene that item `index` shows (without `variety` and `toys`)."""
        return self._draw(index)[1]

    def __getitem__(self, index: int) -> dict:
        rng, scene = self._draw(index)
        caption = scene.caption
        if self.split == "train" and rng.random() < self.OTHER_CAPTION:
            caption = OTHER_CAPTIONS[rng.integers(len(OTHER_CAPTIONS))].format(**vars(scene))
        if self.variety and rng.random() < self.VARIETY:
            picture, caption = random_picture(rng, self.size), "a picture"
        elif self.toys and rng.random() < self.toys:
            picture, toy = random_toy(rng, COLOURS, BACKGROUNDS[scene.background], self.size)
            caption = TOY_CAPTIONS[rng.integers(len(TOY_CAPTIONS))].format(toy=toy, background=scene.background)
        else:
            picture = render_array(scene, self.size)
        return {"image": (picture / 127.5 - 1).astype(np.float32), "caption": caption}
