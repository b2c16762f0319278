"""How alike a generated picture and a subject's photos are, and how far other prompts have drifted.

Similarity is the mean cosine between the pictures' features and the photos', as in DreamBooth (Ruiz et al.
2023, section 4.1), with features for the tiny world in the place of DINO's. They contain nothing learned: an
object is cut out as `ldm.evaluation.shapes` does it, and described by the colours that it has (half of the
weight) and by where on it they are (the other half). So they feel neither the background nor the place nor
the size of the object, nor whether it is mirrored; they feel what it is made of and, within the blur of an
8x8 grid, how it is turned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldm.data.shapes import COLOURS
from ldm.evaluation.shapes import MIN_CONTRAST, as_array, find_object, prompt_accuracy

GRID = 8  # cells of the layout, across and down
SOFTNESS = 40.0  # RGB distance over which one palette colour fades into another
BLUR = np.array([0.25, 0.5, 0.25])

Picture = Image.Image | np.ndarray


def _colour_weights(pixels: np.ndarray) -> np.ndarray:
    """How much of each palette colour every pixel is: [..., 3] in [0, 255] -> [..., 8], summing to 1."""
    distance = ((pixels[..., None, :] - np.array(list(COLOURS.values()), dtype=float)) ** 2).sum(axis=-1)
    weights = np.exp(-(distance - distance.min(axis=-1, keepdims=True)) / (2 * SOFTNESS**2))
    return weights / weights.sum(axis=-1, keepdims=True)


def _layout(colours: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Which colours lie where in the object's bounding square, plus its mirror image: [GRID, GRID, 8]."""
    ys, xs = np.nonzero(covered)
    side = max(np.ptp(ys), np.ptp(xs)) + 1
    rows, columns = (
        ((place - (place.min() + place.max() + 1 - side) / 2) * GRID / side).astype(int) for place in (ys, xs)
    )
    cells = np.zeros((GRID, GRID, colours.shape[-1]))
    np.add.at(cells, (rows.clip(0, GRID - 1), columns.clip(0, GRID - 1)), colours[covered])
    for axis in (0, 1):
        cells = np.apply_along_axis(np.convolve, axis, cells, BLUR, mode="same")
    return cells + cells[:, ::-1]


def features(image: Picture) -> np.ndarray:
    """What a picture's object is made of: a vector [8 + 8 * 64] of length 1 and no negative entry.

    All zeros when the picture shows no object.

    Args:
        image: a PIL image, a uint8 array [H, W, 3], or a float array [H, W, 3] in [-1, 1].
    """
    pixels = as_array(image)
    _, covered = find_object(pixels, MIN_CONTRAST)
    if covered is None:
        return np.zeros(len(COLOURS) * (1 + GRID * GRID))
    colours = _colour_weights(pixels)
    parts = [colours[covered].sum(axis=0), _layout(colours, covered).ravel()]
    return np.concatenate([part / np.linalg.norm(part) for part in parts]) / np.sqrt(2)


def subject_similarity(images: Sequence[Picture], photos: Sequence[Picture]) -> float:
    """The mean cosine, in [0, 1], between every generated picture and every photo of the subject."""
    generated, real = (np.stack([features(picture) for picture in pictures]) for pictures in (images, photos))
    return float((generated @ real.T).mean())


def pixel_change(before: Sequence[Picture], after: Sequence[Picture]) -> float:
    """The mean absolute difference of pictures made with the same seeds, in [0, 1]."""
    pairs = zip(before, after, strict=True)
    return float(np.mean([np.abs(as_array(a) - as_array(b)).mean() / 255 for a, b in pairs]))


def drift(before: Sequence[Picture], after: Sequence[Picture], captions: Sequence[str]) -> dict[str, float]:
    """What tuning changed in pictures of unrelated prompts, which should be nothing.

    Args:
        before, after: pictures of the same captions and seeds by the model before and after tuning.

    Returns:
        accuracy_before, accuracy_after: the share of pictures right in all that their captions name;
        accuracy_change: their difference, negative when tuning did harm; pixel_change: see `pixel_change`.
    """
    was, now = prompt_accuracy(before, captions)["all"], prompt_accuracy(after, captions)["all"]
    change = pixel_change(before, after)
    return {
        "accuracy_before": was,
        "accuracy_after": now,
        "accuracy_change": now - was,
        "pixel_change": change,
    }
