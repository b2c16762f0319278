"""Small sets of real images that come with scikit-learn and scikit-image: nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.base import fit, open_image, to_array
from ldm.errors import UserError

PHOTOS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/motorcycle_left.png"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


class Digits(Sequence):
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, as dict(image=float32 [size, size, 3], class_label=int).

    Args:
        size: pixels a side, to which they are enlarged by cubic interpolation.

    Raises:
        UserError: scikit-learn is not installed.
    """

    def __init__(self, size: int = 16) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("data: the digits come with scikit-learn; pip install scikit-learn") from None
        digits = load_digits()
        pictures = [Image.fromarray((values * 255 / 16).round().astype(np.uint8)) for values in digits.images]
        self.images = [to_array(fit(picture.convert("RGB"), (size, size))) for picture in pictures]
        self.labels = digits.target.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "class_label": self.labels[index]}


class PhotoCrops(Sequence):
    """Random square parts of scikit-image's and scikit-learn's colour photographs, as dict(image=float32 [H, W, 3]).

    Part `index` is a function of (seed, index) and the same at any size.

    Args:
        size: pixels a side to which a part is brought. length: how many parts there are.
        smallest: the least side of a part, as a share of its photograph's shorter side. seed: of all parts.

    Raises:
        UserError: the photographs' packages are not installed, or a parameter is out of its range.
    """

    def __init__(self, size: int = 32, length: int = 4096, smallest: float = 0.4, seed: int = 0) -> None:
        if not 0 < smallest <= 1:
            raise UserError(f"yaml: smallest is {smallest!r}; it must be a share above 0 and at most 1")
        self.size, self.length, self.smallest, self.seed = size, length, smallest, seed
        self.photos = [open_image(folder_of(package) / name) for package, names in PHOTOS.items() for name in names]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        photo = self.photos[rng.integers(len(self.photos))]
        side = round(min(photo.size) * rng.uniform(self.smallest, 1))
        left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
        part = photo.crop((left, top, left + side, top + side))
        return {"image": to_array(part.resize((self.size, self.size), Image.Resampling.BICUBIC))}


def folder_of(package: str) -> Path:
    """Where an installed package lies.

    Raises:
        UserError: it is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None:
        pip = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(f"data: photographs of {pip} are wanted; pip install {pip}")
    return Path(spec.origin).parent
