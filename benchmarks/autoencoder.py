"""Rows `encode`, `decode` and `tiles`: the autoencoder, and a large picture in little memory.

python benchmarks/autoencoder.py                 # 512x512, and 1024x1024 in tiles
python benchmarks/autoencoder.py --size tiny     # to see that it runs
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli


def _input(settings: Settings, part: str, factor: int, like: Any) -> Any:
    """An image or latents, of the model's size times `factor`."""
    side = random_model.latent_side(settings) * factor
    shape = (1, 3, 8 * side, 8 * side) if part == "encode" else (1, 4, side, side)
    return random_model.draw(*shape).to(like.device, like.dtype)


def _job(function: Callable[[Any], Any], x: Any, weights: int) -> Job:
    import torch

    @torch.inference_mode()
    def work() -> Any:
        return function(x)

    return Job(work, least_bytes=weights)


def ours(settings: Settings, part: str, factor: int = 1, tiles: bool = False) -> Job:
    from ldm.memory import keep_freed
    from ldm.modules.fast_layers import speed_up
    from ldm.modules.tiling import tiled

    model = random_model.ours(settings)
    vae = model.first_stage_model
    speed_up(vae, keep=False)  # both as while pictures are drawn
    keep_freed()
    x = _input(settings, part, factor, vae.quant_conv.weight)
    if part == "encode":
        return _job(lambda x: vae.encode(x).parameters, x, random_model.size_of(vae.encoder))
    tile = random_model.latent_side(settings)
    function = (lambda z: tiled(vae.decode, z, tile=tile)) if tiles else vae.decode
    return _job(function, x, random_model.size_of(vae.decoder))


def theirs(settings: Settings, part: str, factor: int = 1) -> Job:
    vae = random_model.theirs(settings).vae
    x = _input(settings, part, factor, vae.quant_conv.weight)
    if part == "encode":
        return _job(lambda x: vae.encode(x).latent_dist.parameters, x, random_model.size_of(vae.encoder))
    return _job(lambda z: vae.decode(z, return_dict=False)[0], x, random_model.size_of(vae.decoder))


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""

    def row(name: str, title: str, factor: int = 1, tiles: bool = False, **bars: Any) -> Row:
        job = {"part": "encode" if name == "encode" else "decode", "factor": factor}
        here = Way("autoencoder here", ours, job | {"tiles": tiles}, random_model.OURS)
        there = Way("diffusers AutoencoderKL", theirs, job, random_model.THEIRS)
        return Row(name, title, here, there, prepare=random_model.write, **bars)

    exact = 1e-3 if settings.device == "cpu" else 0.1
    side = 8 * random_model.latent_side(settings)
    small, large = f"{side}x{side}", f"{2 * side}x{2 * side}"
    return [
        row("encode", f"image to latents, {small}", bar=0.95, tolerance=exact),
        row("decode", f"latents to image, {small}", bar=0.95, tolerance=exact),
        # Tiles see other norms than the whole picture.
        row("tiles", f"{large} in tiles beside the whole", factor=2, tiles=True, memory_bar=1 / 3, tolerance=None,
            rounds=1),
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
