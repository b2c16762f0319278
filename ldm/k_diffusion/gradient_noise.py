"""The gradient noise scale of a run, in its log: how large a batch is worth its computation."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from ldm.errors import UserError
from ldm.k_diffusion.gns import GradientNoiseScale


class GradientNoiseLogger(Callback):
    """Logs `gradient_noise_scale` (McCandlish et al., 2018) from the gradients of small batches and of their mean.

    The small batches are those of one process between two additions to the gradient, so there must be several: by
    `accumulate_grad_batches`, or by several processes.

    Args:
        beta: decay of the averages of both quantities that the scale is the ratio of.
    """

    def __init__(self, beta: float = 0.9998) -> None:
        self.scale = GradientNoiseScale(beta)
        self.square = torch.tensor(0.0)  # |gradient|^2 of the small batches since the last step, summed
        self.batches = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.accumulate_grad_batches * trainer.world_size < 2:
            raise UserError(
                "yaml: lightning.callbacks: the gradient noise scale needs several batches a step; set "
                "lightning.trainer.accumulate_grad_batches to 2 or more, or train with several processes"
            )
        if getattr(module, "stratified", False):
            raise UserError("yaml: stratified: noise levels that depend on each other hide gradient noise; set false")
        self.square = torch.zeros((), device=module.device)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    def _see(self, gradient: torch.Tensor) -> None:
        """Comes before the gradient is added to others, and before other processes' are."""
        self.square += gradient.detach().float().square().sum()

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.batches += 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        accumulated, processes = trainer.accumulate_grad_batches, trainer.world_size
        square, batches = self.square / max(self.batches, 1), self.batches
        self.square, self.batches = torch.zeros_like(self.square), 0
        if batches != accumulated:  # the rest of an epoch
            return
        if processes > 1:
            dist.all_reduce(square)
            square = square / processes
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = accumulated / (1.0 if scaler is None else scaler.get_scale())  # of the loss, undone
        whole = sum(p.grad.detach().float().square().sum() for p in module.parameters() if p.grad is not None)
        size = trainer.datamodule.batch_size
        self.scale.update(float(square) * factor**2, float(whole), size, size * accumulated * processes)
        module.log("gradient_noise_scale", self.scale.get_gns())

    def state_dict(self) -> dict[str, Any]:
        return self.scale.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale.load_state_dict(state_dict)
