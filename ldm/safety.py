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
from ldm.watermark import MESSAGE, MESSAGE_V2

CHECKER = "CompVis/stable-diffusion-safety-checker"  # the hub's name of the original's weights
LOCAL_CHECKER = "models/safety-checker"  # looked at first
IN_PIPELINE = ("safety_checker", "feature_extractor")  # where a diffusers pipeline's folder has the two parts
ADVICE = (
    f"get them with `hf download {CHECKER} --local-dir {LOCAL_CHECKER}`, or name another folder with "
    "--safety_checker, or give --no_safety_checker to draw unchecked pictures"
)
SD_CONTEXT_DIM = 768  # the narrowest text encoder of any Stable Diffusion


class SafetyChecker:
    """StableDiffusionSafetyChecker of diffusers: tells which pictures show what should not be shown.

    Args:
        source: a folder with the checker and its preprocessor_config.json, the folder of a diffusers pipeline that
            has both parts, or a hub name.

    Raises:
        ValueError: weights are missing, misshapen or no numbers: such a checker would let pass what it should not.
        Exception: whatever transformers raises for what it cannot read.
    """

    def __init__(self, source: str) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        checker, processor = (Path(source) / part for part in IN_PIPELINE)
        in_pipeline = checker.is_dir()
        self.processor = CLIPImageProcessor.from_pretrained(str(processor) if in_pipeline else source)
        model, found = StableDiffusionSafetyChecker.from_pretrained(
            str(checker) if in_pipeline else source, output_loading_info=True
        )
        lacking = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
        if lacking:
            raise ValueError(f"no fitting weights '{min(lacking)}' and {len(lacking) - 1} more")
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("its weights are no numbers")
        self.model = model.float().eval()

    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """For each picture, whether it is to be blocked."""
        import torch

        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        arrays = [np.asarray(image, dtype=np.float32) / 255.0 for image in images]
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
    unet = getattr(model.model, "diffusion_model", None)
    return (getattr(unet, "context_dim", None) or 0) >= SD_CONTEXT_DIM


def message_for(model: nn.Module) -> str:
    """What the original writes into the pictures of a model of that kind."""
    from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder

    is_v2 = isinstance(model.cond_stage_model, FrozenOpenCLIPEmbedder)
    return MESSAGE_V2 if is_v2 else MESSAGE


@dataclass
class Protection:
    """What every picture goes through before anyone sees it. Without arguments: nothing."""

    checker: SafetyChecker | None = None
    watermark: bool = False
    message: str = MESSAGE

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: Any = None,
        checker: str | bool = True,
        watermark: bool = True,
        ckpt: str | os.PathLike[str] | None = None,
    ) -> Protection:
        """The protection that a model calls for.

        Args:
            config: the model's yaml; `safety_checker: true` or `false` at its top decides before the width.
            checker: where the checker's weights are, True for the usual place, False for no checker.
            watermark: False for none.
            ckpt: what the model was loaded from; a diffusers folder may have brought a checker.

        Raises:
            UserError: a checker is called for and its weights are missing.
        """
        wanted = None if config is None else config.get("safety_checker")
        if not (is_stable_diffusion(model) if wanted is None else wanted):
            return cls()
        source = os.fspath(checker) if isinstance(checker, str | os.PathLike) else None
        if source is None and ckpt is not None and (Path(ckpt) / IN_PIPELINE[0]).is_dir():
            source = os.fspath(ckpt)
        return cls(load_checker(source) if checker is not False else None, watermark, message_for(model))

    def apply(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[bool]]:
        """(pictures that may be shown, which of them were blocked and are black now)."""
        blocked = self.checker.flags(images) if self.checker else [False] * len(images)
        shown = [Image.new("RGB", im.size) if bad else im for im, bad in zip(images, blocked, strict=True)]
        return [self.mark(image) for image in shown], blocked

    def mark(self, image: Image.Image) -> Image.Image:
        """`image` with the watermark, when it is on and there is room."""
        return watermark.embed(image, self.message) if self.watermark and watermark.fits(image) else image
