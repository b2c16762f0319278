"""What every trainer of a diffusion model does: random numbers, training noise, averaged weights, the optimiser."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.adamw import AdamW
from ldm.modules.ema import LitEma
from ldm.modules.noise import GaussianNoise
from ldm.modules.randomness import GlobalRandom, Randomness, SampleRandom
from ldm.util import UserError, instantiate_from_config


class DiffusionTrainer(pl.LightningModule):
    """Base of the trainers: a subclass sets `model`, the network that is trained, and says a batch's loss.

    Args:
        first_stage_key: the batch entry that holds the images.
        monitor: the logged quantity by which the best checkpoint is chosen.
        scheduler_config: yaml of the learning rate's schedule, by steps; None keeps it constant.
        noise_config: yaml of how training noise is drawn; None for plain Gaussian noise.
    """

    model: nn.Module

    def __init__(
        self,
        first_stage_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Any = None,
        noise_config: Any = None,
    ) -> None:
        super().__init__()
        self.first_stage_key = first_stage_key
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.learning_rate = 1e-4  # the trainer sets it from the yaml's base_learning_rate
        self.seed, self.batches_seen = 0, 0
        self.batch_began: float | None = None  # by the clock; unknown after a pause
        self.draw = instantiate_from_config(noise_config) if noise_config is not None else GaussianNoise()
        self.use_ema = self.evaluate_ema = False

    @abstractmethod
    def shared_step(self, batch: dict, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        """The scalar loss of a batch, and what to log."""

    def get_input(self, batch: dict, key: str) -> torch.Tensor:
        """Images [B, C, H, W] from a batch that holds [B, H, W, C] (or [B, H, W]) under `key`."""
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    # ---- averaged weights -------------------------------------------------------------------------------------

    def average_weights(self, decay: float, evaluate: bool = True, **settings: Any) -> None:
        """Keep an exponential moving average of `model` from here on.

        Args:
            evaluate: validation also scores it, and sample pictures are drawn with it.
            settings: see `LitEma`.
        """
        self.use_ema, self.evaluate_ema = True, evaluate
        self.model_ema = LitEma(self.model, decay=decay, **settings)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within the block the network holds the averaged weights."""
        if not self.use_ema:
            yield
            return
        parameters = list(self.model.parameters())
        self.model_ema.store(parameters)
        self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            self.model_ema.restore(parameters)

    def evaluation_scope(self) -> AbstractContextManager[None]:
        """Within the block the network holds the weights that are evaluated: the averaged ones, or its own."""
        return self.ema_scope() if self.evaluate_ema else nullcontext()

    # ---- randomness -------------------------------------------------------------------------------------------

    def step_random(self, batch_size: int) -> Randomness:
        """Random numbers for the present training batch, a function of (seed, batch number, sample index)."""
        return self.random_of(self.batches_seen, batch_size)

    def random_of(self, batch: int, batch_size: int) -> Randomness:
        """Random numbers for this process's samples of the batch with a number."""
        rank, world = (self.global_rank, self.trainer.world_size) if self._trainer is not None else (0, 1)
        return SampleRandom(self.seed, batch, rank, batch_size, self.device, world)

    def draw_noise(self, x_start: torch.Tensor, random: Randomness | None = None) -> torch.Tensor:
        """Training noise for `x_start` [B, C, H, W], as `noise_config` says."""
        return self.draw(x_start, random or GlobalRandom(len(x_start), x_start.device))

    def noise_share(self) -> dict[str, float]:
        """What part of the time since the last training batch began went into pairing noise, to be logged."""
        now, before = time.perf_counter(), self.batch_began
        self.batch_began = now
        known = before is not None and self.draw.seconds is not None
        return {"noise_share": self.draw.seconds / (now - before)} if known else {}

    # ---- Lightning --------------------------------------------------------------------------------------------

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        share = self.noise_share()
        loss, logs = self.shared_step(batch, self.step_random(self.batch_size_of(batch)))
        self.batches_seen += 1
        self.log_dict(logs | share, batch_size=1)
        return loss

    def on_validation_start(self) -> None:
        self.batch_began = None

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_idx: int) -> None:
        size = self.batch_size_of(batch)
        _, logs = self.shared_step(batch, self.random_of(-1 - batch_idx, size))
        averaged = logs
        if self.evaluate_ema:
            with self.ema_scope():
                _, averaged = self.shared_step(batch, self.random_of(-1 - batch_idx, size))
        logs = {**logs, **{f"{k}_ema": v for k, v in averaged.items()}}
        self.log_dict(logs, batch_size=size, sync_dist=True)

    def batch_size_of(self, batch: dict) -> int:
        """Number of samples in a batch."""
        return len(next(iter(batch.values())))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.use_ema:  # here, so that a checkpoint of this step holds it
            self.model_ema(self.model)

    def setup(self, stage: str) -> None:
        strategy = type(self.trainer.strategy).__name__
        if self.use_ema and strategy in ("FSDPStrategy", "ModelParallelStrategy"):
            raise UserError(
                f"yaml: use_ema: {strategy} shares the weights out, which averages cannot follow; set false"
            )
        if self.use_ema:  # equal on all processes: need not be sent around before every step
            names = [f"model_ema.{name}" for name, _ in self.model_ema.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.batches_seen = checkpoint.get("batches_seen", 0)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser gets: every parameter that is not frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        """The optimiser, by a fused implementation where it has one and may."""
        return AdamW(self.trainable_parameters(), lr=self.learning_rate, fused=fused)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(fused=not self.clips_mixed_gradients())
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    def clips_mixed_gradients(self) -> bool:
        """Whether gradients are clipped in mixed precision, in which Lightning refuses fused optimisers."""
        trainer = self._trainer
        return trainer is not None and bool(trainer.gradient_clip_val) and str(trainer.precision).endswith("mixed")


def noises(seed: int, count: int) -> list[torch.Generator]:
    """A generator a picture, with the seeds `seed`, seed + 1, ..."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]
