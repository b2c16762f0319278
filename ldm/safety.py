"""The safety checker and the watermark: what stands between a Stable Diffusion model and its pictures.

Both are on for every model of Stable Diffusion's kind (see `is_stable_diffusion`), never left out in silence:
without the checker's weights nothing is drawn, unless the person says `--no_safety_checker`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ldm import watermark
from ldm.errors import UserError

CHECKER = "CompVis/stable-diffusion-safety-checker"  # the hub's name of the original's weights
LOCAL_CHECKER = "models/safety-checker"  # looked at first
ADVICE = (
    f"get them with `hf download {CHECKER} --local-dir {LOCAL_CHECKER}`, or name another folder with "
    "--safety_checker, or give --no_safety_checker to draw unchecked pictures"
)
SD_CONTEXT_DIM = 768  # the narrowest text encoder of any Stable Diffusion


class SafetyChecker:
    """StableDiffusionSafetyChecker of diffusers: tells which pictures show what should not be shown."""

    def __init__(self, source: str) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        self.processor = CLIPImageProcessor.from_pretrained(source)
        self.model = StableDiffusionSafetyChecker.from_pretrained(source).eval()

    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """For each picture, whether it is to be blocked."""
        import torch

        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        arrays = np.stack([np.asarray(image, dtype=np.float32) / 255.0 for image in images])
        with torch.no_grad():
            _, flags = self.model(images=arrays, clip_input=pixels)
        return [bool(flag) for flag in flags]


@lru_cache(maxsize=1)
def load_checker(source: str | None = None) -> SafetyChecker:
    """The safety checker from a folder or a hub name, which may be downloaded.

    By default from `models/safety-checker`, or from what the hub's client has downloaded before: the network is
    not asked.

    Raises:
        UserError: there are no weights; the message says what to do.
    """
    if source is None:
        source = LOCAL_CHECKER if Path(LOCAL_CHECKER).is_dir() else _downloaded(CHECKER)
    try:
        return SafetyChecker(source)
    except Exception as error:  # the hub's client raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"safety checker: '{source}' cannot be loaded ({reason}); {ADVICE}") from error


def _downloaded(name: str) -> str:
    """The folder in which the hub's client keeps a model."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise UserError(f"safety checker: there are no weights in {LOCAL_CHECKER}/; {ADVICE}")
    return str(Path(config).parent)


def is_stable_diffusion(model: nn.Module) -> bool:
    """Whether a model draws the open world from text: its cross-attention is as wide as Stable Diffusion's.

    The tiny model (width 128) has seen nothing but drawn shapes.
    """
    return (getattr(model.model.diffusion_model, "context_dim", None) or 0) >= SD_CONTEXT_DIM


@dataclass
class Protection:
    """What every picture goes through before anyone sees it. Without arguments: nothing."""

    checker: SafetyChecker | None = None
    watermark: bool = False

    @classmethod
    def of(cls, model: nn.Module, config: Any = None, checker: str | bool = True, watermark: bool = True) -> Protection:
        """The protection that a model calls for.

        Args:
            config: the model's yaml; `safety_checker: true` or `false` at its top decides before the width.
            checker: where the checker's weights are, True for the usual place, False for no checker.
            watermark: False for none.

        Raises:
            UserError: a checker is called for and its weights are missing.
        """
        wanted = None if config is None else config.get("safety_checker")
        if not (is_stable_diffusion(model) if wanted is None else wanted):
            return cls()
        source = checker if isinstance(checker, str | os.PathLike) else None
        return cls(load_checker(source) if checker is not False else None, watermark)

    def apply(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[bool]]:
        """(pictures that may be shown, which of them were blocked and are black now)."""
        blocked = self.checker.flags(images) if self.checker else [False] * len(images)
        shown = [Image.new("RGB", im.size) if bad else im for im, bad in zip(images, blocked, strict=True)]
        return [self.mark(image) for image in shown], blocked

    def mark(self, image: Image.Image) -> Image.Image:
        """`image` with the watermark, when it is on and there is room."""
        return watermark.embed(image) if self.watermark and watermark.fits(image) else image
