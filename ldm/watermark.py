"""The invisible watermark of Stable Diffusion's pictures (ShieldMnt's invisible-watermark, method dwtDct)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.errors import UserError

MESSAGE = "StableDiffusionV1"  # what the original writes
MESSAGE_V2 = "SDV2"  # and that of Stable Diffusion v2
MIN_AREA = 256 * 256  # below it the method has no room
ENOUGH = 0.9  # of a message's bits: by chance, fewer than 1 in 10^5 pictures agree so well with either message


def fits(image: Image.Image) -> bool:
    """Whether a picture is large enough to carry the watermark."""
    return image.width * image.height >= MIN_AREA


def _library() -> object:
    try:
        import imwatermark
    except ImportError as error:
        raise UserError(
            f"watermark: the package invisible-watermark cannot be imported ({error}); "
            "pip install invisible-watermark, or give --no_watermark"
        ) from error
    return imwatermark


def _pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 3] bytes, blue first, as the library takes them.

    Raises:
        UserError: the picture is too small.
    """
    if not fits(image):
        raise UserError(f"watermark: {image.width}x{image.height} pixels are too few; the method needs 256x256 in area")
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def embed(image: Image.Image, message: str = MESSAGE) -> Image.Image:
    """`image` (RGB, at least 256x256 pixels in area) with `message` hidden in it."""
    encoder = _library().WatermarkEncoder()
    encoder.set_watermark("bytes", message.encode())
    return Image.fromarray(np.ascontiguousarray(encoder.encode(_pixels(image), "dwtDct")[:, :, ::-1]))


def read(image: Image.Image, length: int = len(MESSAGE)) -> str:
    """What is hidden in a picture, `length` characters; noise when there is nothing."""
    decoder = _library().WatermarkDecoder("bytes", 8 * length)
    return decoder.decode(_pixels(image), "dwtDct").decode(errors="replace")


def agreement(image: Image.Image, message: str = MESSAGE) -> float:
    """The share of `message`'s bits that a picture carries: 1 for a watermark, about 0.5 for none.

    It lies between where the method loses bits, in small or flat pictures. JPEG destroys it.
    """
    bits = np.unpackbits(np.frombuffer(message.encode(), dtype=np.uint8)).astype(bool)
    found = _library().WatermarkDecoder("bits", len(bits)).decode(_pixels(image), "dwtDct")
    return float((np.asarray(found, dtype=bool) == bits).mean())


def find(image: Image.Image) -> str | None:
    """Which of Stable Diffusion's messages a picture carries, or None."""
    return next((message for message in (MESSAGE, MESSAGE_V2) if agreement(image, message) >= ENOUGH), None)
