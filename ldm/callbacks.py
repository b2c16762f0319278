"""What happens beside training: the bar, sample pictures, adapter directories, the random numbers of a step."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from ldm.modules.pictures import make_grid, save_picture
from ldm.modules.randomness import sample_seed
from ldm.resume import global_batch
from ldm.signals import PicturesAbandoned, Stopped, watch


class EncodeImages(Callback):
    """Has the data module encode its images, where it does: when the processes have met, before training begins."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            model = getattr(pl_module, "encoding_model", pl_module)  # a student's is its teacher
            trainer.datamodule.encode(model, trainer.strategy.root_device)


class StepSeeds(Callback):
    """Makes all global generators (python, numpy, torch, CUDA) a function of (seed, batch, process) as well.

    What draws from them (dropout, a data set of one's own in the main process) then goes on exactly after a resume,
    and does not depend on whether pictures were drawn or validation ran in between.
    """

    def _seed(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seed = sample_seed(module.seed, "global", module.batches_seen, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._seed(trainer, module)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._seed(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._seed(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._seed(trainer, module)


def peak_memory() -> float:
    """The most memory that this process has held so far in GiB: the device's on CUDA, or else the machine's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StepBar(Callback):
    """One bar over all steps of the run: smoothed loss, images a second over all processes, memory, time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.loss: float | None = None
        self.images, self.since = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        total = int(total) if total != float("inf") else None
        self.bar = tqdm(
            total=total, initial=trainer.global_step, unit="step", desc="Training", disable=not trainer.is_global_zero,
            dynamic_ncols=True, smoothing=0.05, mininterval=0.5,
        )  # fmt: skip
        self.images, self.since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None or self.bar.disable:
            return
        self.images += global_batch(trainer)
        steps = trainer.global_step - self.bar.n
        if not steps:
            return
        self.bar.update(steps)
        if self.bar.n % 10 == 0 or self.loss is None:  # reading the loss waits for the device
            self._describe(outputs["loss"] if isinstance(outputs, dict) else outputs)

    def _describe(self, loss: torch.Tensor | None) -> None:
        if loss is not None:
            self.loss = float(loss) if self.loss is None else 0.9 * self.loss + 0.1 * float(loss)
        now = time.perf_counter()
        shown = {
            "loss": "-" if self.loss is None else f"{self.loss:.4f}",
            "images/s": f"{self.images / (now - self.since):.3g}",
            "GiB": f"{peak_memory():.1f}",
        }
        self.images, self.since = 0, now
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.close()


class ArtefactCheckpoint(Callback):
    """Writes what was trained as `<directory>/<step>-...` every so many steps, at the end, and at an ending signal.

    Args:
        trained_on: what the files say of their training. See `ldm.training_results.save`.
    """

    def __init__(self, directory: str | os.PathLike[str], every_n_train_steps: int, trained_on: dict[str, Any]) -> None:
        self.directory, self.every, self.trained_on = Path(directory), every_n_train_steps, dict(trained_on)
        self.written = 0

    def write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save what was trained as of the present step, once."""
        from ldm.training_results import save

        step = trainer.global_step
        if not trainer.is_global_zero or step in (0, self.written):
            return
        for what, path in save(module, self.directory, str(step), {**self.trained_on, "steps": step}).items():
            print(f"\n{what} of step {step}: {path}")
        self.written = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.write(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            self.write(trainer, module)


class ImageLogger(Callback):
    """Sample pictures during training, as PNG under `<run>/images/<split>/` and in TensorBoard or wandb.

    Every time from the same noise, so that they show progress; with `prompts`, also of the same captions.

    Args:
        batch_frequency: every that many steps. max_images: of a batch.
        increase_log_steps: also at steps 1, 2, 4, 8, ... below it. log_first_step: also after the first step.
        prompts: what to draw in place of the batch's own captions (or class labels).
        seed: of the noise; picture i has seed + i.
        log_images_kwargs: passed to the model's `log_images(batch, N=..., **kwargs)`.
        disabled: make none. clamp, rescale, log_on_batch_idx: unused.
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
        prompts: Sequence[str | int] | None = None,
        seed: int = 0,
        log_images_kwargs: dict | None = None,
    ) -> None:
        self.batch_frequency, self.max_images = batch_frequency, max_images
        self.early_steps = {2**n for n in range(batch_frequency.bit_length())} if increase_log_steps else set()
        self.disabled, self.log_first_step = disabled, log_first_step
        self.log_images_kwargs = {"seed": seed, "prompts": list(prompts) if prompts else None} | dict(
            log_images_kwargs or {}
        )
        self.last = 0

    def due(self, step: int) -> bool:
        """Whether pictures are made after `step` finished steps."""
        return step % self.batch_frequency == 0 or step in self.early_steps or (step == 1 and self.log_first_step)

    @torch.no_grad()
    def log_images(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, split: str) -> None:
        """Make and write the pictures of one batch; a signal or a full disk ends that, and not the run."""
        if watch.caught:
            return
        was_training = module.training
        module.eval()
        try:
            pictures = module.log_images(batch, N=self.max_images, split=split, **self.log_images_kwargs)
            self._write(trainer, pictures, split)
        except PicturesAbandoned:
            print("\nSample pictures are left out: a signal came")
        except OSError as error:
            print(f"\nSample pictures are left out: {error}")
        finally:
            module.train(was_training)

    def _write(self, trainer: pl.Trainer, pictures: dict[str, torch.Tensor], split: str) -> None:
        root = Path(trainer.default_root_dir) / "images" / split
        step = trainer.global_step
        for name, images in pictures.items():
            grid = make_grid(images[: self.max_images], nrow=4)
            save_picture(grid, root / f"{name}_gs-{step:06}_e-{trainer.current_epoch:06}.png")
            writer = getattr(trainer.logger, "experiment", None)
            if hasattr(trainer.logger, "log_image"):
                trainer.logger.log_image(f"{split}/{name}", [grid], step=step)
            elif hasattr(writer, "add_image"):
                tensor = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
                writer.add_image(f"{split}/{name}", tensor, step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.disabled or not trainer.is_global_zero or step in (0, self.last) or not self.due(step):
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
