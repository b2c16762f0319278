"""What a training step of Flash Diffusion costs: seconds and memory, with random weights.

    python benchmarks/flash_step.py                                   Stable Diffusion v1 at 512x512, one picture
    python benchmarks/flash_step.py --starts 0 --terms distillation   from pure noise, without the two other terms

The teacher takes K - start steps, with guidance, so that a step from pure noise costs most. LPIPS, whose weights are
not here, makes way for l2.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

TERMS = ("distillation", "matching", "adversarial")


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Time training steps of Flash Diffusion, with random weights.")
    flag = parser.add_argument
    flag("--base", default="configs/distill/flash-sd.yaml", help="yaml of the training")
    flag(
        "--starts", type=int, nargs="+", default=[24, 0], help="places in the teacher's K steps, one training step each"
    )
    flag("--terms", nargs="+", choices=TERMS, default=list(TERMS), help="of the loss")
    flag("--batch_size", type=int, default=1, help="pictures a step")
    flag("--side", type=int, default=512, help="pixels of a picture's side")
    flag("--device", default="cpu", help="auto, cuda, cuda:N, mps or cpu")
    return parser


def build(options: argparse.Namespace, start: int) -> Any:
    """A trainer whose batches all begin at `start`, its weights random."""
    from ldm.util import instantiate_from_config, load_yaml, pick_device

    config = load_yaml(options.base).model
    steps = config.params.teacher_steps
    if not 0 <= start < steps:
        raise UserError(f"--starts {start}: is not within 0 .. {steps - 1}")
    config.params.distillation_loss, config.params.variance = "l2", 0.01
    modes = [float(i == start) for i in range(steps)]
    config.params.phases = [{"steps": 1, "modes": modes, **{term: float(term in options.terms) for term in TERMS}}]
    model = instantiate_from_config(config).to(pick_device(options.device))
    model.teacher_loaded = True
    model.make_student()
    return model.to(model.device)


def measure(options: argparse.Namespace, start: int) -> tuple[float, float]:
    """Seconds of a whole training step, and the most memory of the process so far in GiB."""
    import torch

    from ldm.callbacks import peak_memory

    model = build(options, start)
    optimizer = model.make_optimizer(fused=False)
    side = options.side
    images = torch.rand(options.batch_size, side, side, 3, device=model.device) * 2 - 1
    captions = ["a photograph of an astronaut riding a horse"] * options.batch_size
    began = time.perf_counter()
    loss, _ = model.shared_step(
        {model.first_stage_key: images, model.teacher.cond_stage_key: captions}, model.step_random(options.batch_size)
    )
    loss.backward()
    optimizer.step()
    float(loss.detach())  # waits for the device
    return time.perf_counter() - began, peak_memory()


def main(argv: Sequence[str]) -> None:
    """Measure each start, and print the table."""
    options = parser().parse_args(argv)
    if min(options.batch_size, options.side) < 1:
        raise UserError("--batch_size and --side must be at least 1")
    if not Path(options.base).is_file():
        raise UserError(f"--base: there is no file '{options.base}'")
    print("| start | seconds a training step | peak memory |\n|---|---|---|")
    for start in options.starts:
        seconds, memory = measure(options, start)
        print(f"| {start} | {seconds:.1f} | {memory:.1f} GiB |", flush=True)


if __name__ == "__main__":
    cli.run(main)
