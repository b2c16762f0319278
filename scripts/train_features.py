"""Train the tiny world's feature net, by which FID and KID of its pictures are measured.

python scripts/train_features.py            a few minutes on one core; writes models/tiny/features.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Train the tiny world's feature net, by which its FID is measured.")
    flag = parser.add_argument
    flag("--steps", type=int, default=2000, help="training steps")
    flag("--batch_size", type=int, default=64, help="scenes a step")
    flag("--learning_rate", type=float, default=3e-3, help="the highest of the schedule")
    flag("--seed", type=int, default=0, help="of weights, scenes and noise")
    flag("--out", default="models/tiny/features.safetensors", help="file to write, in 16 bits")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for values that cannot be."""
    for name in ("steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if not 0 < options.learning_rate < 1:
        raise UserError(f"--learning_rate {options.learning_rate:g}: must lie between 0 and 1")
    if not options.out.endswith(".safetensors"):
        raise UserError(f"--out '{options.out}': must end in .safetensors")


def main(argv: Sequence[str]) -> None:
    """Train, measure and write."""
    options = parser().parse_args(argv)
    check(options)

    import torch

    from ldm.evaluation.scene_features import ANSWERS, draw_scenes, train
    from ldm.weight_files import save_checkpoint

    net = train(options.steps, options.batch_size, options.learning_rate, options.seed)
    save_checkpoint(net.state_dict(), options.out, half=True)
    images, scenes = draw_scenes(1000, options.seed + 10**6)
    with torch.no_grad():
        answers = net.answer(images)
    for name in ANSWERS:
        right = sum(answer[name] == getattr(scene, name) for answer, scene in zip(answers, scenes, strict=True))
        print(f"{name:<12}{right / len(scenes):.1%} of {len(scenes)} new scenes")
    print(f"Written: {options.out}")


if __name__ == "__main__":
    cli.run(main)
