"""Rows `overhead_*`: what a sampler takes beside its network: 50 steps with a network that costs nothing.

python benchmarks/sampler_overhead.py

Latents, guidance and steps are those of one picture of Stable Diffusion v1; the network gives back a part of what it
gets. The time of the row beside that of 50 rows `unet` is the share of a run that is not the network's.
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

STEPS, SCALE, SHAPE = 50, 7.5, (4, 64, 64)
SAMPLERS = {  # name here: (diffusers' scheduler, its settings)
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    "dpm_solver": ("DPMSolverMultistepScheduler", {}),
}


def network(x: Any, t: Any, context: Any) -> Any:
    """As if noise: half of the guided half of the batch, a third of the other."""
    return x * context


def _context(settings: Settings) -> Any:
    import torch

    return torch.tensor([1 / 3, 1 / 2], device=settings.device).view(2, 1, 1, 1)


def ours(settings: Settings, sampler: str) -> Job:
    import torch

    from ldm.drawing import Options
    from ldm.models.diffusion.schedule import NoiseSchedule

    class Model(NoiseSchedule):
        parameterization, v_posterior = "eps", 0.0

        def __init__(self) -> None:
            super().__init__()
            self.register_schedule(linear_start=0.00085, linear_end=0.012)

        def apply_model(self, x: Any, t: Any, condition: Any) -> Any:
            return network(x, t, condition)

    model = Model().to(settings.device)
    empty, full = _context(settings).split(1)
    drawer = Options(sampler=sampler, progress=False).make_sampler(model)
    start = random_model.draw(1, *SHAPE).to(settings.device)

    @torch.inference_mode()
    def work() -> torch.Tensor:
        return drawer.sample(
            STEPS, 1, SHAPE, full, x_T=start, unconditional_guidance_scale=SCALE, unconditional_conditioning=empty,
            show_progress=False,
        )[0]  # fmt: skip

    return Job(work)


def theirs(settings: Settings, sampler: str) -> Job:
    """The pipeline's loop."""
    import diffusers
    import torch

    name, options = SAMPLERS[sampler]
    trained = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, name)(**trained, **options)
    context, start = _context(settings), random_model.draw(1, *SHAPE).to(settings.device)

    @torch.inference_mode()
    def work() -> torch.Tensor:
        scheduler.set_timesteps(STEPS, device=settings.device)
        x = start * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x] * 2), t)
            empty, full = network(both, t, context).chunk(2)
            x = scheduler.step(empty + SCALE * (full - empty), t, x, return_dict=False)[0]
        return x

    return Job(work)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""

    def row(sampler: str) -> Row:
        here = Way(f"{sampler} here", ours, {"sampler": sampler}, ("ldm.drawing",))
        there = Way(f"diffusers {SAMPLERS[sampler][0]}", theirs, {"sampler": sampler}, random_model.THEIRS)
        exact = None if sampler == "dpm_solver" else 1e-3  # whose timesteps lie elsewhere
        title = f"{STEPS} steps of {sampler} without a network"
        return Row(f"overhead_{sampler}", title, here, there, tolerance=exact, rounds=9)

    return [row(sampler) for sampler in SAMPLERS]


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
