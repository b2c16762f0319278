"""Photographs from folders, as people keep them: EXIF-turned, with alpha, 16-bit, CMYK, odd-sized, broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm.errors import UserError

SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
INTERPOLATIONS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
NAMED = 5  # broken images of a folder are told by their names, up to this many
_reported: set[Path] = set()  # a folder is read for training and again for validation; one report is enough


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by name; hidden files and files of other kinds are left out.

    Raises:
        UserError: the folder does not exist, is no folder, or holds no image files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"image folder {folder} {what}; give a folder with photographs")
    found = folder.rglob("*") if recursive else folder.iterdir()
    paths = [
        path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise UserError(f"image folder {folder} holds no image files ({' '.join(sorted(SUFFIXES))})")
    return sorted(paths)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16* and I) and floating-point grey (F, in [0, 1] or [0, 255]) as 8-bit grey."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I") and (image.mode != "I" or values.max(initial=0) > 255):
        values = values / 257
    elif image.mode == "F" and values.max(initial=0) <= 1:
        values = values * 255
    return Image.fromarray(np.clip(np.nan_to_num(values), 0, 255).round().astype(np.uint8))


@contextmanager
def _opened(path: str | Path | BinaryIO, name: str | None) -> Iterator[Image.Image]:
    """An image file of which the header is read; what cannot be read is a UserError that calls it `name`."""
    name = name or str(path)
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"image {name} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"image {name} cannot be read: it is no image, or of an unknown kind") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"image {name} cannot be read: {error}") from error


def open_image(path: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file as people see it: turned as its EXIF says, alpha over white, any mode as RGB.

    Args:
        path: the file, or its open contents.
        name: what errors call it; None calls it by its path.

    Raises:
        UserError: the file is missing, truncated, too large to be a photograph, or no image.
    """
    with _opened(path, name) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    return to_rgb(image)


def image_size(path: str | Path | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """(width, height) of an image file as `open_image` gives it, from its header alone.

    A PNG whose orientation stands behind its pixels is taken as it lies.

    Raises:
        UserError: as `open_image`, but what lies behind the header is not looked at.
    """
    with _opened(path, name) as file:
        in_header = file.format != "PNG" or "exif" in file.info  # else Pillow decodes the picture to look for it
        turned = in_header and file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
        return file.size[::-1] if turned else file.size


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, alpha over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_interpolation(name: str) -> None:
    """Raise a UserError unless `name` is one of `INTERPOLATIONS`."""
    if name not in INTERPOLATIONS:
        raise UserError(f"yaml: interpolation is {name!r}; it must be one of {', '.join(INTERPOLATIONS)}")


def fit(
    image: Image.Image, size: tuple[int, int], interpolation: str = "bicubic", crop: bool = True, place: float = 0.5
) -> Image.Image:
    """Resize an image to (width, height) pixels; it keeps its aspect, and loses no more than that makes necessary.

    Args:
        crop: keep a part of the side that is too long; False squashes the whole image.
        place: where that part lies: its beginning at 0, its middle at 0.5, its end at 1.
    """
    box = (0, 0, *image.size)
    if crop:
        width = min(image.width, image.height * size[0] / size[1])
        height = min(image.height, image.width * size[1] / size[0])
        left, top = int((image.width - width) * place), int((image.height - height) * place)
        box = (left, top, left + width, top + height)
    return image.resize(size, INTERPOLATIONS[interpolation], box=box)


def make_square(
    image: Image.Image,
    size: int | None = None,
    interpolation: str = "bicubic",
    center_crop: bool = True,
    place: float = 0.5,
) -> Image.Image:
    """`fit` to a square, `size` pixels a side (None: as large as its shorter side).

    Raises:
        UserError: `interpolation` is none of linear, bilinear, bicubic, lanczos.
    """
    check_interpolation(interpolation)
    return fit(image, (size or min(image.size),) * 2, interpolation, center_crop, place)


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image as float32 [H, W, 3] in [-1, 1]."""
    return np.asarray(image, dtype=np.float32) / 127.5 - 1


CROPS = ("center", "random", "squash")


@dataclass(frozen=True)
class Framing:
    """How the pictures of a training set are brought to size, cropped and mirrored.

    Args:
        size: pixels a side of a square; None keeps each picture's shorter side.
        interpolation: linear, bilinear, bicubic or lanczos.
        crop: what of a picture's too long side is kept: its middle ("center") or any part ("random"); "squash" keeps
            it all.
        flip_p: probability of mirroring.
        seed: with epoch and index, what random crops and flips are a function of.

    Raises:
        UserError: a parameter is out of its range.
    """

    size: int | None = None
    interpolation: str = "bicubic"
    crop: str = "center"
    flip_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_interpolation(self.interpolation)
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise UserError(f"yaml: size is {self.size!r}; it must be a whole number of pixels")
        if self.crop not in CROPS:
            raise UserError(f"yaml: crop is {self.crop!r}; it must be one of {', '.join(CROPS)}")
        if not 0 <= self.flip_p <= 1:
            raise UserError(f"yaml: flip_p is {self.flip_p}; it must lie between 0 and 1")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"yaml: seed is {self.seed!r}; it must be a whole number of at least 0")

    def choose(self, epoch: int, index: int) -> tuple[bool, float]:
        """Whether the picture is mirrored in this epoch, and `place` of `fit`."""
        flip, place = np.random.default_rng([self.seed, epoch, index]).random(2)
        return bool(flip < self.flip_p), float(place) if self.crop == "random" else 0.5

    def __call__(
        self,
        image: Image.Image,
        epoch: int,
        index: int,
        size: tuple[int, int] | None = None,
        flip: bool | None = None,
    ) -> np.ndarray:
        """The picture as float32 [H, W, 3] in [-1, 1].

        Args:
            size: (width, height) in place of the square. flip: mirror it or not, whatever `choose` says.
        """
        chosen, place = self.choose(epoch, index)
        size = size or (self.size or min(image.size),) * 2
        array = to_array(fit(image, size, self.interpolation, self.crop != "squash", place))
        return np.ascontiguousarray(array[:, ::-1]) if (chosen if flip is None else flip) else array


class ImageFolder(Sequence):
    """The readable photographs of a folder, as float32 [H, W, 3] in [-1, 1], sorted by file name.

    Every file is opened once at the start; those that cannot be read are left out, and reported on stderr: the first
    by their names, the others by their number.

    Args:
        size: pixels a side, see `make_square`.
        center_crop: see `make_square`.
        recursive: look into subfolders too.

    Raises:
        UserError: no folder, or nothing in it can be read.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int | None = None,
        interpolation: str = "bicubic",
        center_crop: bool = True,
        recursive: bool = False,
    ) -> None:
        check_interpolation(interpolation)
        self.size, self.interpolation, self.center_crop = size, interpolation, center_crop
        candidates = list_images(folder, recursive)
        broken = {path: error for path in candidates if (error := self._error_of(path))}
        self._report(broken, folder, len(candidates))
        self.paths = [path for path in candidates if path not in broken]
        if not self.paths:
            raise UserError(f"image folder {folder}: none of its {len(candidates)} image files can be read")

    @staticmethod
    def _error_of(path: Path) -> UserError | None:
        try:
            open_image(path)
        except UserError as error:
            return error
        return None

    @staticmethod
    def _report(broken: Mapping[Path, UserError], folder: str | Path, total: int) -> None:
        new = [path for path in broken if path.resolve() not in _reported]
        _reported.update(path.resolve() for path in new)
        for path in new[:NAMED]:
            print(f"skipped: {broken[path]}", file=sys.stderr)
        if len(new) > NAMED:
            print(f"skipped: {len(new) - NAMED} more of the {total} images of {folder}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        image = open_image(self.paths[index])
        return to_array(make_square(image, self.size, self.interpolation, self.center_crop))
