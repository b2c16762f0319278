"""Pictures as files: what made them is written into them, and nothing that lies there is overwritten."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.modules.pictures import save_picture

SYNTAX = "()[]\\"  # what weights a prompt's words in the web UI


@dataclass(frozen=True)
class Settings:
    """What a picture was made with: the same model and settings make it again."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    sampler: str  # as people call it, e.g. DPM++ 2M Karras
    scale: float
    eta: float | None  # None for what the sampler has by default
    height: int
    width: int
    strength: float | None = None  # of image to image
    clip_skip: int | None = None
    prompt_weighting: bool = False
    noise_settings: Mapping[str, str] = field(default_factory=dict)  # in the web UI's words, e.g. Sigma churn
    solver: str = ""  # what neither these nor the sampler's name say
    precision: str = "autocast"
    model: str = ""
    vae: str = ""
    adapter: str = ""

    def parameters(self) -> str:
        """The text of a PNG's `parameters` chunk, in the form that AUTOMATIC1111's web UI reads."""
        entries: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": f"{self.scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
        }
        if self.model:
            entries["Model"] = self.model
        if self.vae:
            entries["VAE"] = self.vae
        if self.strength is not None:
            entries["Denoising strength"] = f"{self.strength:g}"
        if self.clip_skip is not None:
            entries["Clip skip"] = self.clip_skip
        if set(SYNTAX) & set(self.prompt + self.negative_prompt):  # there brackets are weights by default
            entries["Emphasis"] = "No norm" if self.prompt_weighting else "None"
        if self.eta is not None:
            entries["Eta"] = f"{self.eta:g}"
        entries |= self.noise_settings
        if self.solver:
            entries["Solver"] = self.solver
        if self.precision != "autocast":
            entries["Precision"] = self.precision
        if self.adapter:
            entries["Adapter"] = self.adapter
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        text = "\n".join([*lines, ", ".join(f"{k}: {_quoted(v)}" for k, v in entries.items())])
        return text.encode("utf-8", "replace").decode()  # bytes of a command line that are no text become "?"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


@dataclass
class Picture:
    """An image and how it was made."""

    image: Image.Image
    settings: Settings
    blocked: bool = False  # by the safety checker; the image is black then

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG, whole or not at all, with the settings in its `parameters` chunk.

        Raises:
            UserError: the disk is full, or the like.
        """
        info = PngInfo()
        info.add_text("parameters", self.settings.parameters())
        try:
            save_picture(self.image, path, pnginfo=info)
        except OSError as error:
            raise UserError(f"outdir: '{path}' cannot be written: {error.strerror or error}") from error


def grid_of(images: Sequence[Image.Image], columns: int, padding: int = 2) -> Image.Image:
    """One picture of several of the same size, row by row."""
    width, height = images[0].width + padding, images[0].height + padding
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + padding, rows * height + padding))
    for i, image in enumerate(images):
        sheet.paste(image, (padding + i % columns * width, padding + i // columns * height))
    return sheet


@dataclass(frozen=True)
class OutputFolder:
    """`samples/00000.png` ... and `grid-0000.png` ... in a folder; numbers go on where they left off."""

    path: Path

    def save(self, picture: Picture) -> Path:
        """Write a picture under the next number."""
        path = _next_free(self.path / "samples", r"(\d{5,})\.png", "{:05}.png")
        picture.save(path)
        return path

    def save_grid(self, pictures: Sequence[Picture], columns: int, mark: Callable[[Image.Image], Image.Image]) -> Path:
        """Write all pictures as one under the next number, through `mark` (the watermark)."""
        path = _next_free(self.path, r"grid-(\d{4,})\.png", "grid-{:04}.png")
        first = pictures[0]
        sheet = mark(grid_of([picture.image for picture in pictures], columns))
        Picture(sheet, first.settings).save(path)
        return path


def _next_free(folder: Path, pattern: str, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for file in folder.iterdir() if (match := re.fullmatch(pattern, file.name))]
    return folder / name.format(max(taken, default=-1) + 1)
