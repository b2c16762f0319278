"""What happens beside training: the bar, sample pictures, checkpoints that survive an interruption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from tqdm import tqdm

from ldm.modules.pictures import make_grid, save_picture
from ldm.util import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside their name and then renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)


class StepBar(Callback):
    """One bar over all steps of the run, with the smoothed loss and the time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.loss: float | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        total = int(total) if total != float("inf") else None
        self.bar = tqdm(
            total=total, initial=trainer.global_step, unit="step", desc="Training", disable=not trainer.is_global_zero,
            dynamic_ncols=True, smoothing=0.05, mininterval=0.5,
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None or self.bar.disable:
            return
        self.bar.update(trainer.global_step - self.bar.n)
        if self.bar.n % 10 == 0 or self.loss is None:  # reading the loss waits for the device
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            if loss is not None:
                value = float(loss)
                self.loss = value if self.loss is None else 0.9 * self.loss + 0.1 * value
                self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.close()


class SaveOnInterrupt(Callback):
    """Ctrl-C writes `last.ckpt` before the run ends, and says where."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory) / "last.ckpt"

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step > 0:
            trainer.save_checkpoint(self.path)
            if trainer.is_global_zero:
                print(f"\nInterrupted at step {trainer.global_step}; saved {self.path}")


class AdapterCheckpoint(Callback):
    """Writes `<directory>/<step>-adapters` every so many finished steps, at the end, and on Ctrl-C."""

    def __init__(self, directory: str | os.PathLike[str], every_n_train_steps: int, trained_on: dict[str, Any]) -> None:
        self.directory, self.every, self.trained_on = Path(directory), every_n_train_steps, dict(trained_on)
        self.written = 0

    def write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the adapters of the present step, once."""
        step = trainer.global_step
        if not trainer.is_global_zero or step in (0, self.written):
            return
        path = self.directory / f"{step}-adapters"
        module.model.diffusion_model.save_adapter_to_dir(path, **self.trained_on, steps=step)
        self.written = step
        print(f"\nAdapters of step {step}: {path}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.write(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.write(trainer, module)


def checkpoint_callbacks(directory: str, settings: dict[str, Any], monitor: str | None) -> list[Callback]:
    """Periodic checkpoints (`every_n_train_steps` and the like from the yaml) and `last.ckpt`."""
    options = {"dirpath": directory, "filename": "{epoch:06}", "save_last": True, "verbose": False} | settings
    if "every_n_train_steps" in options and "filename" not in settings:
        options["filename"] = "{step:09}"
        options["auto_insert_metric_name"] = False
    if monitor is not None and "monitor" not in settings:
        options |= {"monitor": monitor, "save_top_k": 3}
    return [ModelCheckpoint(**options)]


class ImageLogger(Callback):
    """Sample pictures during training, as PNG under `<run>/images/<split>/` and in TensorBoard.

    Args:
        batch_frequency: every that many steps. max_images: of a batch.
        increase_log_steps: also at steps 1, 2, 4, 8, ... below it. log_first_step: also before the first step.
        log_images_kwargs: passed to the model's `log_images(batch, N=..., **kwargs)`.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: dict | None = None,
    ) -> None:
        self.batch_frequency, self.max_images = batch_frequency, max_images
        self.early_steps = {2**n for n in range(batch_frequency.bit_length())} if increase_log_steps else set()
        self.disabled, self.log_first_step = disabled, log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})

    def due(self, step: int) -> bool:
        """Whether pictures are made after `step` finished steps."""
        if step == 0:
            return self.log_first_step
        return step % self.batch_frequency == 0 or step in self.early_steps

    @torch.no_grad()
    def log_images(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, split: str) -> None:
        """Make and write the pictures of one batch."""
        was_training = module.training
        module.eval()
        pictures = module.log_images(batch, N=self.max_images, split=split, **self.log_images_kwargs)
        if was_training:
            module.train()
        root = Path(trainer.logger.save_dir if trainer.logger else trainer.default_root_dir) / "images" / split
        step = trainer.global_step
        for name, images in pictures.items():
            grid = make_grid(images[: self.max_images], nrow=4)
            save_picture(grid, root / f"{name}_gs-{step:06}_e-{trainer.current_epoch:06}.png")
            writer = getattr(trainer.logger, "experiment", None)
            if hasattr(writer, "add_image"):
                tensor = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
                writer.add_image(f"{split}/{name}", tensor, step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.disabled or not trainer.is_global_zero or not self.due(step) or step == getattr(self, "last", None):
            return
        self.last = step
        self.log_images(trainer, module, batch, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        if self.disabled or batch_idx or not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.log_images(trainer, module, batch, "val")
