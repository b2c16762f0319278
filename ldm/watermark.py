"""The invisible watermark of Stable Diffusion's pictures (ShieldMnt's invisible-watermark, method dwtDct)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.errors import UserError

MESSAGE = "StableDiffusionV1"  # what the original writes
MIN_AREA = 256 * 256  # below it the method has no room


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


def embed(image: Image.Image, message: str = MESSAGE) -> Image.Image:
    """`image` (RGB, at least 256x256 pixels in area) with `message` hidden in it."""
    encoder = _library().WatermarkEncoder()
    encoder.set_watermark("bytes", message.encode())
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    return Image.fromarray(np.ascontiguousarray(encoder.encode(bgr, "dwtDct")[:, :, ::-1]))


def read(image: Image.Image, length: int = len(MESSAGE)) -> str:
    """What is hidden in a picture, `length` characters; noise when there is nothing."""
    decoder = _library().WatermarkDecoder("bytes", 8 * length)
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    return decoder.decode(bgr, "dwtDct").decode(errors="replace")
