"""Row `text_to_image`: a picture from words, guidance and decoding included.

python benchmarks/text_to_image.py               # 512x512; 4 PLMS steps on a CPU, 50 on a GPU
python benchmarks/text_to_image.py --size tiny   # to see that it runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli

PROMPT, SCALE, SEED = "a photograph of an astronaut riding a horse", 7.5, 42


def ours(settings: Settings, steps: int) -> Job:
    from ldm.inference import txt2img
    from ldm.safety import Protection

    model = random_model.ours(settings)
    options: dict[str, Any] = {
        "steps": steps, "sampler": "plms", "scale": SCALE, "progress": False, "protection": Protection(),
        "precision": "full" if settings.device == "cpu" else "bf16",
    }  # fmt: skip

    def work() -> Any:
        return as_numbers(txt2img(model, PROMPT, seed=SEED, **options)[0].image)

    weights = (model.model, model.first_stage_model.decoder, model.cond_stage_model)
    calls = steps + 1  # PLMS' first step makes two
    return Job(work, least_bytes=random_model.size_of(*weights, *[model.model] * (calls - 1)))


def theirs(settings: Settings, steps: int) -> Job:
    """The pipeline from the same noise; its scheduler, PNDM without Runge-Kutta steps, is PLMS."""
    import torch

    pipe = random_model.theirs(settings)
    side = random_model.latent_side(settings)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator(random_source(settings)).manual_seed(SEED),
                        device=random_source(settings))  # fmt: skip
    noise = noise.to(pipe.unet.device, pipe.unet.dtype)

    def work() -> Any:
        return as_numbers(pipe(PROMPT, num_inference_steps=steps, guidance_scale=SCALE, latents=noise).images[0])

    return Job(work)


def random_source(settings: Settings) -> str:
    """Where our pictures' random numbers are drawn."""
    return "cuda" if settings.device.startswith("cuda") else "cpu"


def as_numbers(picture: Any) -> Any:
    """A picture as an array; a level of 255 apart is rounding."""
    import numpy as np

    return np.asarray(picture, dtype=np.float32)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""
    steps = 4 if settings.device == "cpu" else 50
    here = Way("txt2img here", ours, {"steps": steps}, random_model.OURS)
    peer = Way("diffusers StableDiffusionPipeline", theirs, {"steps": steps}, random_model.THEIRS)
    bar, tolerance = (0.95, 0.02) if settings.device == "cpu" else (0.9, None)
    title = f"picture from words, {steps} PLMS steps"
    return [Row("text_to_image", title, here, peer, bar, tolerance=tolerance, rounds=2, prepare=random_model.write)]


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
