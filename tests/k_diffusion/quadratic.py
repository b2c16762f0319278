"""Samples whose gradients are known, and a process of two that measures them; imports little, since it starts anew."""

import os
from pathlib import Path

import torch
from torch import nn

from ldm.k_diffusion.gns import DDPGradientStatsHook

MEAN = torch.tensor([1.0, -2.0, 0.5])  # of a sample's gradient
SPREAD = torch.tensor([2.0, 1.0, 3.0])  # its standard deviation along each axis


def samples(count: int, seed: int = 0) -> torch.Tensor:
    """[count, 3]."""
    return MEAN + SPREAD * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


class Distances(nn.Module):
    """The loss of a sample s is |w - s|^2 / 2, at w = 0, where its gradient is -s."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.weight - rows).square().sum(1).mean() / 2


def measure_norms(env: dict[str, str], path: Path) -> None:
    """Two steps of a process with its own batches; the norms that the hook gives, and the gradient."""
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(Distances())
    hook, found = DDPGradientStatsHook(model), []
    for step in range(2):
        model.zero_grad()
        model(samples(5, seed=2 * step + int(env["RANK"]))).backward()
        found.append((*hook.get_stats(), model.module.weight.grad.clone()))
    torch.save(found, path)
