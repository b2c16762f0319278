"""The tiny world's reader: what a picture shows, so that following a prompt is a number, not an impression.

A reading uses no learned part: the background is the palette colour nearest to the border, the object is
what differs from the border, its shape is the outline that overlaps it best (intersection over union at the
object's area and centre of mass), its colour the palette colour nearest to most of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from ldm.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, WORLD, mask
from ldm.errors import UserError

MIN_CONTRAST = 40.0  # an object differs from its background by at least this much (RGB distance, 0 to 442)
MAX_COLOUR_ERROR = 75.0  # a colour further than this from every palette colour has no name
MIN_OVERLAP = 0.7  # an outline that overlaps its best template less is no shape of this world
MIN_AREA = 40  # pixels of 64x64; a small star covers 150
SPECK = 0.05  # parts smaller than this share of the object are ignored
MIN_AGREEMENT = 0.6  # the share of an object's pixels that must have its colour
MASTER, MASTER_DIAMETER = 256, 224  # pixels of the drawings that templates are looked up in
BORDER = np.pad(np.zeros((WORLD - 4, WORLD - 4), dtype=bool), 2, constant_values=True)  # no figure reaches here


@dataclass(frozen=True)
class Reading:
    """What a picture shows, or what a caption asks for; None where there is nothing to say."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    background: str | None = None


ATTRIBUTES = tuple(field.name for field in fields(Reading))
VOCABULARY = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "background": BACKGROUNDS}


def parse(caption: str) -> Reading:
    """The attributes that a caption names, e.g. `a red ring` -> Reading(shape="ring", colour="red")."""
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    named = {name: [word for word in words if word in known] for name, known in VOCABULARY.items()}
    return Reading(**{name: found[0] for name, found in named.items() if found})


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """A picture as float64 [64, 64, 3] in [0, 255].

    Takes a PIL image, a uint8 array, or a float array in [-1, 1] as data sets give it; resamples other sizes.
    """
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        image = (np.clip(image, -1, 1) * 127.5 + 127.5).round().astype(np.uint8)
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    if picture.size != (WORLD, WORLD):
        picture = picture.resize((WORLD, WORLD), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64)


def find_object(pixels: np.ndarray, threshold: float | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Part a picture into background and object.

    Args:
        pixels: [64, 64, 3] in [0, 255].
        threshold: how far from the background an object's pixels lie (RGB distance); None means half as far
            as most of them, which finds the outline of an object of one colour.

    Returns:
        The background's colour [3], and the object's pixels as a boolean mask [64, 64] (None: no object).
    """
    background = np.median(pixels[BORDER], axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    far = distance > distance.max() / 2
    contrast = np.median(distance[far]) if far.any() else 0.0
    if contrast < MIN_CONTRAST:
        return background, None
    labels, count = ndimage.label(distance > (contrast / 2 if threshold is None else threshold))
    areas = ndimage.sum_labels(np.ones_like(distance), labels, range(1, count + 1))
    kept = [label for label, area in enumerate(areas, start=1) if area >= SPECK * areas.sum()]
    covered = np.isin(labels, kept)
    return background, covered if covered.sum() >= MIN_AREA else None


@cache
def _master(shape: str) -> tuple[np.ndarray, float, float]:
    """A shape drawn large, to look templates up in.

    Returns:
        The drawing [256, 256], True inside, 224 across; the shape's area at diameter 1; and how far
        its centre of mass lies below its centre at diameter 1.
    """
    covered = mask(shape, MASTER_DIAMETER / MASTER * WORLD, WORLD / 2, WORLD / 2, MASTER) > 0.5
    below = np.nonzero(covered)[0].mean() + 0.5 - MASTER / 2
    return covered, covered.sum() / MASTER_DIAMETER**2, below / MASTER_DIAMETER


def match_shape(covered: np.ndarray) -> tuple[str, float, float]:
    """The shape whose outline overlaps an object best: (shape, diameter in pixels, overlap in [0, 1])."""
    ys, xs = np.nonzero(covered)
    mass_y, mass_x = ys.mean() + 0.5, xs.mean() + 0.5
    pixels = np.arange(WORLD) + 0.5
    best = ("", 0.0, 0.0)
    for shape in SHAPES:
        drawing, area, below = _master(shape)
        diameter = (len(ys) / area) ** 0.5
        rows, columns = (
            (MASTER / 2 + (pixels - centre) * MASTER_DIAMETER / diameter).astype(int).clip(0, MASTER - 1)
            for centre in (mass_y - below * diameter, mass_x)
        )
        template = drawing[rows[:, None], columns]
        overlap = (covered & template).sum() / (covered | template).sum()
        if overlap > best[2]:
            best = (shape, float(diameter), float(overlap))
    return best


def _nearest(palette: dict[str, tuple[int, int, int]], colours: np.ndarray) -> np.ndarray:
    """The index of the palette colour nearest to each of `colours` [N, 3], -1 where all are too far."""
    distance = np.linalg.norm(colours[:, None] - np.array(list(palette.values())), axis=-1)
    return np.where(distance.min(axis=1) <= MAX_COLOUR_ERROR, distance.argmin(axis=1), -1)


def _object_colour(pixels: np.ndarray, covered: np.ndarray) -> str | None:
    """The palette colour that most of an object's pixels have, its blurred rim left out where possible."""
    inside = ndimage.binary_erosion(covered)
    votes = _nearest(COLOURS, pixels[inside if inside.sum() >= MIN_AREA // 2 else covered])
    winner = np.bincount(votes[votes >= 0], minlength=len(COLOURS)).argmax()
    return list(COLOURS)[winner] if (votes == winner).mean() >= MIN_AGREEMENT else None


def read(image: Image.Image | np.ndarray) -> Reading:
    """What a picture of the tiny world shows; attributes that cannot be made out are None.

    Args:
        image: a PIL image, a uint8 array [H, W, 3], or a float array [H, W, 3] in [-1, 1].
    """
    pixels = as_array(image)
    background, covered = find_object(pixels)
    index = int(_nearest(BACKGROUNDS, background[None])[0])
    background_name = list(BACKGROUNDS)[index] if index >= 0 else None
    if covered is None:
        return Reading(background=background_name)
    shape, diameter, overlap = match_shape(covered)
    size = min(SIZES, key=lambda name: abs(np.log(diameter / SIZES[name])))
    colour = _object_colour(pixels, covered)
    whole = overlap >= MIN_OVERLAP and not covered[BORDER].any()
    return Reading(shape if whole else None, colour, size, background_name)


def compare(reading: Reading, wanted: Reading) -> dict[str, bool]:
    """Whether each attribute that `wanted` names was read so, and under "all" whether every one was.

    Raises:
        UserError: `wanted` names nothing.
    """
    named = {name: value for name, value in asdict(wanted).items() if value is not None}
    right = {name: getattr(reading, name) == value for name, value in named.items()}
    if not right:
        raise UserError(
            f"a caption names nothing that the reader knows; use words such as {', '.join(COLOURS)} and "
            f"{', '.join(SHAPES)}"
        )
    return {**right, "all": all(right.values())}


def shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share that is right of several results of `compare`, an attribute at a time.

    An attribute is counted over the results that have it, and left out when none does.
    """
    counted = {name: [result[name] for result in results if name in result] for name in (*ATTRIBUTES, "all")}
    return {name: sum(values) / len(values) for name, values in counted.items() if values}


def prompt_accuracy(images: Sequence[Image.Image | np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """The share of pictures that show what their captions name: by attribute, and under "all" in everything.

    Raises:
        UserError: a caption names nothing.
    """
    pairs = zip(images, captions, strict=True)
    return shares([compare(read(image), parse(caption)) for image, caption in pairs])
