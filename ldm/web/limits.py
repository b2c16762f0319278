"""What a browser may ask for: every value that comes from one goes through here. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

LONGEST_PROMPT = 2000  # characters
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of uploads: Pillow's readers of others are older and seldom looked at
MAX_PIXELS = 24_000_000  # of an upload, decoded
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """How much one page may ask for.

    Args:
        max_size: pixels a side of pictures. max_steps: of a sampler. max_pictures: of one job.
        max_queue: jobs that wait. max_train_steps: of one training. max_photos: of one training.
        max_upload: MiB of one file. max_folder: GiB of the output folder; above it nothing new is begun.
    """

    max_size: int
    max_steps: int = 150
    max_pictures: int = 16
    max_queue: int = 20
    max_train_steps: int = 5000
    max_photos: int = 40
    max_upload: int = 20
    max_folder: float = 20.0

    def check_room(self, folder: Path) -> None:
        """Raise UserError when the output folder has grown too large."""
        used = folder_size(folder) / 2**30
        if used > self.max_folder:
            raise UserError(
                f"the output folder holds {used:.1f} GiB, and --max_folder is {self.max_folder:g}: remove some of it"
            )


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # it went away meanwhile
                continue
    return total


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number within [low, high].

    Raises:
        UserError: it is something else; truth values are no numbers.
    """
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not low <= value <= high:  # what is no number (NaN) lies nowhere
        raise UserError(f"{name}: it must be a number from {low:g} to {high:g}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within [low, high]."""
    number(name, value, low, high)
    if value != int(value):
        raise UserError(f"{name} {value:g}: it must be a whole number")
    return int(value)


def text(name: str, value: Any, longest: int = LONGEST_PROMPT) -> str:
    """A text of at most `longest` characters, without control characters."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name}: it must be text")
    if len(value) > longest:
        raise UserError(f"{name}: {len(value)} characters; it may have {longest}")
    value = value.encode("utf-8", "replace").decode()  # lone surrogates have no place in a file
    return "".join(c for c in value if c >= " " or c in "\n\t").strip()


def choice(name: str, value: Any, among: Sequence[str]) -> str:
    """One of the names that there are."""
    if not isinstance(value, str) or value not in among:
        raise UserError(f"{name}: it must be one of {', '.join(among) or 'none: there are none yet'}")
    return value


def class_word(value: Any) -> str:
    """What kind of thing a subject is: a word or a few."""
    value = text("Class word", value, 40)
    if not re.fullmatch(r"[^\W_][\w' -]*", value):
        raise UserError("Class word: say in a word or two what it is, such as dog or coffee mug: letters only")
    return value


def limit_decoding() -> None:
    """Have Pillow refuse, everywhere in this process, to decode more than `MAX_PIXELS`, or anything but `FORMATS`."""
    from PIL import Image

    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # it warns there, and refuses at twice that


def open_image(name: str, path: Any) -> Image.Image:
    """An uploaded file, decoded, turned as its EXIF says, RGB or RGBA.

    Raises:
        UserError: there is none, or it is no image of `FORMATS`, damaged, or too large.
    """
    from PIL import Image, ImageOps

    if not path:
        raise UserError(f"{name}: choose an image first")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name}: {image.width}x{image.height} pixels are too many; make it smaller")
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGB", "RGBA"):
                return image
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"{name}: this file is no image that can be read (PNG, JPEG, WebP or BMP)") from error


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side of `side` pixels."""
    from PIL import Image as Pillow

    factor = side / max(image.size)
    size = tuple(max(1, round(length * factor)) for length in image.size)
    return image if size == image.size else image.resize(size, Pillow.Resampling.LANCZOS)
