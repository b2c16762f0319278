"""Rows `unet*` and `compiling`: a pass of the U-Net, as every step of a guided picture makes it.

python benchmarks/unet.py                                   # 64x64 latents, batch 2
python benchmarks/unet.py --rows unet_compiled compiling    # compiled; on a CPU these must be asked for
python benchmarks/unet.py --size tiny                       # to see that it runs
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli


def _inputs(settings: Settings, width: int, dtype: object) -> list:
    """Noisy latents, timesteps, text states."""
    import torch

    side = random_model.latent_side(settings)
    x, context = random_model.draw(2, 4, side, side), random_model.draw(2, 77, width, seed=1)
    t = torch.tensor([500, 500], device=settings.device)
    return [x.to(settings.device, dtype), t, context.to(settings.device, dtype)]


def ours(settings: Settings, compiled: bool = False) -> Job:
    import torch

    from ldm.compilation import compile_blocks
    from ldm.memory import keep_freed
    from ldm.modules.fast_layers import speed_up

    unet = random_model.ours(settings).model.diffusion_model
    if compiled:
        compile_blocks(unet)
    speed_up(unet)  # both as while pictures are drawn
    keep_freed()
    inputs = _inputs(settings, unet.context_dim, unet.dtype)

    @torch.inference_mode()
    def work() -> torch.Tensor:
        return unet(*inputs)

    return Job(work, least_bytes=random_model.size_of(unet))


def theirs(settings: Settings, compiled: bool = False) -> Job:
    import torch

    unet = random_model.theirs(settings).unet
    if compiled:
        unet.compile_repeated_blocks()
    inputs = _inputs(settings, unet.config.cross_attention_dim, unet.dtype)

    @torch.inference_mode()
    def work() -> torch.Tensor:
        return unet(*inputs, return_dict=False)[0]

    return Job(work, least_bytes=random_model.size_of(unet))


def uncached(settings: Settings, way: Callable[..., Job]) -> Job:
    """Compiled by `way` at its first call, with nothing kept of earlier compilations on the disk."""
    folder = tempfile.mkdtemp()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return way(settings, compiled=True)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""
    tolerance = 1e-3 if settings.device == "cpu" else 0.05
    names = "U-Net here", "diffusers UNet2DConditionModel, channels_last"

    def row(name: str, title: str, makes: Any, arguments: Any, ending: str = "", **more: Any) -> Row:
        sides = zip(names, makes, arguments, (random_model.OURS, random_model.THEIRS), strict=True)
        here, there = (Way(name + ending, make, told, modules) for name, make, told, modules in sides)
        return Row(name, title, here, there, **more, tolerance=tolerance, prepare=random_model.write)

    compiled = {"ending": ", compiled block by block", "asked": settings.device == "cpu"}
    first = [{"way": ours}, {"way": theirs}]
    return [
        row("unet", "U-Net pass, batch 2", (ours, theirs), ({}, {}), bar=0.95),
        row("unet_compiled", "the same", (ours, theirs), [{"compiled": True}] * 2, bar=0.95, **compiled),
        row("compiling", "its first call", [uncached] * 2, first, fresh=True, warm_up=False, rounds=1, **compiled),
    ]


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
