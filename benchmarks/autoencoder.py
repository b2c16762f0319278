"""Rows `encode`, `decode`, `tiles` and `tiles_memory`: the autoencoder, and large pictures in little memory.

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
    from ldm.modules.fast_conv import speed_up
    from ldm.modules.tiling import tiled

    model = random_model.ours(settings)
    vae = model.first_stage_model
    speed_up(vae)  # as while pictures are drawn
    x = _input(settings, part, factor, vae.quant_conv.weight)
    if part == "encode":
        return _job(lambda x: vae.encode(x).parameters, x, random_model.size_of(vae.encoder))
    tile = random_model.latent_side(settings)
    function = (lambda z: tiled(vae.decode, z, tile=tile)) if tiles else vae.decode
    return _job(function, x, random_model.size_of(vae.decoder))


def theirs(settings: Settings, part: str, factor: int = 1, tiles: bool = False) -> Job:
    pipe = random_model.theirs(settings)
    vae = pipe.vae
    x = _input(settings, part, factor, vae.quant_conv.weight)
    if part == "encode":
        return _job(lambda x: vae.encode(x).latent_dist.parameters, x, random_model.size_of(vae.encoder))
    if tiles:
        vae.enable_tiling()
        vae.tile_latent_min_size = random_model.latent_side(settings)
        vae.tile_sample_min_size = 8 * vae.tile_latent_min_size
    return _job(lambda z: vae.decode(z, return_dict=False)[0], x, random_model.size_of(vae.decoder))


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""

    def row(name: str, title: str, here: dict[str, Any], peer: dict[str, Any], **bars: Any) -> Row:
        common = {"part": "encode" if name == "encode" else "decode"}
        theirs_called = "diffusers AutoencoderKL" + (", in tiles" if peer.get("tiles") else "")
        a = Way("autoencoder here", ours, common | here, random_model.OURS)
        b = Way(theirs_called, theirs, common | peer, random_model.THEIRS)
        return Row(name, title, a, b, prepare=random_model.write, **bars)

    exact = 1e-3 if settings.device == "cpu" else 0.1
    side = 8 * random_model.latent_side(settings)
    small, large = f"{side}x{side}", f"{2 * side}x{2 * side}"
    whole, tiles = {"factor": 2}, {"factor": 2, "tiles": True}
    return [
        row("encode", f"image to latents, {small}", {}, {}, bar=0.95, tolerance=exact),
        row("decode", f"latents to image, {small}", {}, {}, bar=0.95, tolerance=exact),
        # Tiles see other norms than the whole picture, and diffusers lays them elsewhere.
        row("tiles", f"latents to image, {large}, in tiles", tiles, tiles, bar=0.95, tolerance=None, rounds=1),
        row("tiles_memory", f"{large} in tiles beside the whole", tiles, whole, memory_bar=1 / 3, tolerance=None,
            rounds=1),
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
