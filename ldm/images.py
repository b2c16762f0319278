"""Images as people bring them, ready for a model."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from ldm.loading import Geometry


def on_white(image: Image.Image) -> Image.Image:
    """RGB, turned as EXIF says, transparent places white."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1] from bytes [H, W, 3]."""
    values = torch.from_numpy(array.astype(np.float32) / 127.5 - 1.0)
    return values.permute(2, 0, 1)[None].contiguous()


def prepare_image(
    image: Image.Image, geometry: Geometry, height: int | None = None, width: int | None = None
) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]: turned as EXIF says, on white, sized to what the model takes."""
    image = on_white(image)
    width, height = (
        given or max(1, own // geometry.multiple) * geometry.multiple
        for given, own in ((width, image.width), (height, image.height))
    )
    geometry.check(height, width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return as_tensor(np.asarray(image))
