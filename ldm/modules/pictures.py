"""Pictures for people: text drawn as an image, tensors as grids and files."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.util import atomic_path


def log_txt_as_img(size: Sequence[int], captions: Sequence[str], font_size: int | None = None) -> torch.Tensor:
    """Captions drawn black on white: [B, 3, H, W] in [-1, 1] for `size` (H, W)."""
    height, width = int(size[0]), int(size[1])
    font = ImageFont.load_default(font_size or max(9, min(height, width) // 16))
    rows = []
    for caption in captions:
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        columns = max(4, int(width / max(1.0, draw.textlength("n", font=font))))
        draw.text((1, 1), "\n".join(textwrap.wrap(caption, columns)), fill="black", font=font)
        rows.append(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] as [B, H, W, C] bytes, rounded as the original does (truncation after * 255)."""
    images = ((images.detach().float().clamp(-1, 1) + 1) / 2).cpu()
    return (255.0 * images.permute(0, 2, 3, 1).numpy()).astype(np.uint8)


def make_grid(images: torch.Tensor, nrow: int = 4, padding: int = 2) -> Image.Image:
    """One picture of all `images` [B, C, H, W] in [-1, 1], `nrow` a row."""
    tiles = to_uint8(images)
    count, height, width, channels = tiles.shape
    nrow = max(1, min(nrow, count))
    rows = -(-count // nrow)
    sheet = np.zeros((rows * (height + padding) + padding, nrow * (width + padding) + padding, 3), dtype=np.uint8)
    for i, tile in enumerate(tiles):
        y = padding + (i // nrow) * (height + padding)
        x = padding + (i % nrow) * (width + padding)
        sheet[y : y + height, x : x + width] = tile if channels == 3 else tile[..., :1]
    return Image.fromarray(sheet)


def save_picture(picture: Image.Image, path: str | os.PathLike[str], **options: object) -> None:
    """Write a PNG that appears whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", **options)
