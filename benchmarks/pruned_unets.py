"""Stable Diffusion v1's U-Net beside the pruned ones: time and memory of a pass, and of a distillation step.

python benchmarks/pruned_unets.py                 # a guided picture's pass at 64x64 latents, the three side by side
python benchmarks/pruned_unets.py --step sd-tiny  # one training step, teacher and averaged weights included
python benchmarks/pruned_unets.py --small         # narrow networks, to see that it runs

Weights are random: neither time nor memory depends on them. Full size needs about 8 GiB, a step about 18.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
V1 = "v1"
YAMLS = {V1: "stable-diffusion/v1-inference", "sd-small": "distill/sd-small", "sd-tiny": "distill/sd-tiny"}
GIB = 2**30


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Time and memory of Stable Diffusion v1's U-Net and of pruned ones.")
    parser.add_argument("--step", choices=[name for name in YAMLS if name != V1], help="measure a training step of it")
    parser.add_argument("--batch", type=int, help="samples (default: 2, a guided picture; of a training step 1)")
    parser.add_argument("--side", type=int, default=64, help="of the latents (default: 64, pictures of 512 pixels)")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each, of which the median counts (default: 5)")
    parser.add_argument("--teacher_precision", choices=("32", "16", "bf16"), default="32", help="in a training step")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--small", action="store_true", help="narrow networks, for a quick run")
    return parser


def model_section(name: str, small: bool) -> Any:
    """The yaml of a model."""
    from ldm.util import load_yaml

    section = load_yaml(CONFIGS / f"{YAMLS[name]}.yaml").model
    if small:
        section.params.unet_config.params.model_channels = 32
    return section


def inputs_of(options: argparse.Namespace, device: Any, batch: int) -> list[Any]:
    """Noisy latents, timesteps and text states."""
    import torch

    x, context = torch.randn(batch, 4, options.side, options.side), torch.randn(batch, 77, 768)
    return [value.to(device) for value in (x, torch.full((batch,), 500), context)]


def passes(options: argparse.Namespace, device: Any) -> list[str]:
    """The table of forward passes."""
    import torch

    from ldm.evaluation.cost import side_by_side
    from ldm.util import count_params, instantiate_from_config

    unets = {name: instantiate_from_config(model_section(name, options.small).params.unet_config) for name in YAMLS}
    inputs = inputs_of(options, device, options.batch or 2)
    works = {name: partial(unet.to(device).eval(), *inputs) for name, unet in unets.items()}
    with torch.inference_mode():
        costs = side_by_side(works, options.rounds, device)
    lines = ["| U-Net | parameters | weights | seconds a pass | speed, of v1's | memory beside the weights | of v1's |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, cost in costs.items():
        count, whole = count_params(unets[name]), costs[V1]
        lines.append(
            f"| {name} | {count:,} | {4 * count / GIB:.2f} GiB | {cost['seconds']:.3f} "
            f"| {whole['seconds'] / cost['seconds']:.2f} | {cost['bytes'] / GIB:.2f} GiB "
            f"| {cost['bytes'] / max(whole['bytes'], 1):.2f} |"
        )
    return lines


def step(options: argparse.Namespace, device: Any) -> list[str]:
    """Time and memory of one training step of a student: both networks, the gradient, the optimiser, the average."""
    import torch

    from ldm.callbacks import peak_memory
    from ldm.distillation.bksdm import PRECISIONS, Teacher
    from ldm.distillation.pruning import feature_pairs
    from ldm.evaluation.cost import run_once
    from ldm.models.diffusion.ddpm import DiffusionWrapper
    from ldm.modules.diffusionmodules.unet_layout import UNetLayout
    from ldm.util import instantiate_from_config

    section, teacher = model_section(options.step, options.small), model_section(V1, options.small).params.unet_config
    section.params.first_stage_config = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    section.params.cond_stage_config = {"target": "torch.nn.Identity"}
    model = instantiate_from_config(section).to(device).train()
    layouts = (UNetLayout.of_params(unet.params) for unet in (section.params.unet_config, teacher))
    precision = {"32": 32, "16": 16}.get(options.teacher_precision, options.teacher_precision)
    network = DiffusionWrapper(teacher, "crossattn").to(PRECISIONS[precision])
    model.teacher = Teacher(network, feature_pairs(*layouts))
    x, t, context = inputs_of(options, device, options.batch or 1)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-5, fused=True)

    def work() -> None:
        model.p_losses(x, context, t)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.model_ema(model.model)

    run_once(work, device)  # the first makes the optimiser's state
    seconds, _ = run_once(work, device)
    return [f"{options.step}: {seconds:.1f} s a step, {peak_memory():.1f} GiB at the peak of the process"]


def main(argv: Sequence[str]) -> None:
    """Parse the flags, measure, print."""
    options = parser().parse_args(argv)
    import torch

    from ldm.util import pick_device

    device = pick_device(options.device)
    print(f"{device.type}, {torch.get_num_threads()} threads\n")
    print("\n".join((step if options.step else passes)(options, device)))


if __name__ == "__main__":
    cli.run(main)
