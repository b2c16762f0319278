"""A run's checkpoints: written whole or not at all, when they are due or a signal asks, never of a broken model."""

from __future__ import annotations

import datetime
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm import resume
from ldm.errors import UserError
from ldm.processes import exit_code
from ldm.signals import Stopped, watch
from ldm.util import atomic_path

ON_SIGNAL = ("save", "continue", "exit")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # what a full or failing disk says
DIVERGED = "a lower learning rate, gradient_clip_val or precision 32 may help"
LOOK_EVERY = 10  # steps between looks at the loss on a device that would have to be waited for


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside their name and then renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"checkpoint '{path}' cannot be written: {disk_reason(error, Path(path).parent)}"
            ) from error


def disk_reason(error: BaseException, folder: Path) -> str:
    """Why a file could not be written into `folder`: what the system said first, or that little room is left."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    free = shutil.disk_usage(folder).free
    return f"{' '.join(str(error).split())[:120]} ({free / 2**20:.0f} MiB are free there)"


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint (its settings are those of the yaml), and besides:

    - every checkpoint holds the `Place` at which the last whole step ended, from which a run goes on exactly;
    - SIGTERM, SIGINT and SIGUSR1 are heeded at the end of a step, on all processes at the same one;
    - a loss or weights that are no finite numbers end the run, and are not saved;
    - `last.ckpt` is written whenever a save is due, whatever `monitor` says, and at the end of the run;
    - without `monitor`, `save_top_k` is how many of the newest are kept beside `last.ckpt`.

    Args:
        on_signal: `save` and end; `continue` after saving; `exit` without saving.
    """

    def __init__(self, on_signal: str = "save", **settings: Any) -> None:
        self.on_signal = on_signal
        self.keep = settings.get("save_top_k", 1) if settings.get("monitor") is None else -1
        if self.keep > 0:
            settings["save_top_k"] = -1  # `prune` takes the old ones away
        super().__init__(**{"enable_version_counter": False} | settings)
        self.place, self.step = resume.Place(), 0  # where the run stood after this step
        self.heeded = 0  # the last step after which signals were heeded
        self.last_written = 0  # the last step after which `last.ckpt` was written besides Lightning's saves
        self.diverged = torch.tensor(0)  # the first step with a loss that was no number
        self.group: Any = None

    # ---- the course of a run ------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.step = self.heeded = self._last_global_step_saved = self.last_written = trainer.global_step
        self.diverged = torch.tensor(0, device=pl_module.device)
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")  # numbers of the CPU, so that no device is waited for
        watch.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look_at(outputs, trainer.global_step)
        stepped = trainer.global_step != self.heeded
        if stepped:
            self.heeded = trainer.global_step
            self._note_place(trainer, pl_module)
            if self.diverged.device.type == "cpu" or self.heeded % LOOK_EVERY == 0:
                self._end_if_diverged(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if stepped:
            if self._every_n_train_steps and self.heeded % self._every_n_train_steps == 0:
                self._save_last_when_due(trainer)
            self._heed_signal(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._every_n_epochs and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save_last_when_due(trainer)

    def _save_last_when_due(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`, even where Lightning saves nothing since the monitored number is unknown or no better."""
        if self.save_last:
            self.save_now(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._heed_signal(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_last_when_due(trainer)

    def _note_place(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember the place if a step has just ended."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        done = trainer.fit_loop.batch_idx + 1
        last = trainer.is_last_batch or done == trainer.num_training_batches
        self.place = resume.Place(
            epoch=trainer.current_epoch + last,
            batches=0 if last else done,
            total=trainer.fit_loop.total_batch_idx + 1,
            batches_seen=module.batches_seen,
            global_batch=resume.global_batch(trainer),
            learning_rate=module.learning_rate,
        )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._note_place(trainer, pl_module)  # other callbacks may save before this one's turn comes
        self.place.write(checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        place = resume.enter(trainer, pl_module, checkpoint) if trainer.state.fn == "fit" else None
        if place is None:
            return
        self.place = place
        where = f"step {checkpoint['global_step']}, epoch {place.epoch}, {place.batches} batches into it"
        what = "weights (averaged ones too), optimiser, learning-rate schedule, random numbers, place in the data"
        print(f"Goes on from {where}: {what}")
        if place.learning_rate != pl_module.learning_rate:
            print(f"Changed: learning rate {place.learning_rate:.2e} -> {pl_module.learning_rate:.2e}")
        samples = resume.global_batch(trainer)
        if place.global_batch != samples:
            print(f"Changed: samples a batch, over all processes: {place.global_batch} -> {samples}")
        if resume.reshuffled(trainer, place):
            print(
                "The batches of aspect-ratio buckets are others for another size: the rest of this epoch may show "
                "pictures again that its beginning showed, and leave out others; the next epoch is whole"
            )

    # ---- signals ------------------------------------------------------------------------------------------

    def agree(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.group is None:
            return number
        largest = torch.tensor(int(number))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def _heed_signal(self, trainer: pl.Trainer) -> None:
        number = self.agree(watch.caught)
        if not number:
            return
        if self.on_signal != "exit":
            self.save_now(trainer)
        if trainer.is_global_zero:
            said = "left" if self.on_signal == "exit" else f"saved {self.last_model_path}"
            print(f"\nSignal {number} at step {trainer.global_step}: {said}")
        if self.on_signal == "continue":
            watch.begin()
            return
        leave = SystemExit if self.on_signal == "exit" else Stopped
        raise leave(exit_code(128 + number))

    def save_now(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt` as of the last whole step, where it is not that already."""
        saved = self._last_global_step_saved
        if trainer.global_step in (0, saved, self.last_written):
            return
        self.last_model_path = os.path.join(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        self._save_checkpoint(trainer, self.last_model_path)
        self.last_written = trainer.global_step
        self._last_global_step_saved = saved  # Lightning may still save at this step, after validation

    # ---- what is not saved --------------------------------------------------------------------------------

    def _look_at(self, outputs: Any, step: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:  # no waiting for the device
            bad = ~torch.isfinite(loss.detach()).all()
            self.diverged = torch.where((self.diverged == 0) & bad, max(step, 1), self.diverged)

    def _end_if_diverged(self, trainer: pl.Trainer) -> None:
        step = self.agree(int(self.diverged))
        if step:
            said = f"training: the loss was no finite number at step {step}; {DIVERGED}"
            self._end(said if trainer.is_global_zero else None)

    def _end(self, reason: str | None) -> None:
        """End the run on all processes; the first one, or the one that has a reason, says it."""
        if reason is None:
            raise SystemExit(exit_code(2))
        kept = [path for path in (self.last_model_path, self.best_model_path) if path and os.path.exists(path)]
        raise UserError(
            f"{reason}; " + (f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint was saved")
        )

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._end_if_diverged(trainer)
        if self.agree(not finite(trainer.lightning_module)):
            said = f"training: the weights are no finite numbers after step {trainer.global_step}; {DIVERGED}"
            self._end(said if trainer.is_global_zero else None)
        failure = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except UserError as error:  # of the process that writes: the others wait where it would have come
            failure = error
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if self.agree(failure is not None):
            self._end(None if failure is None else str(failure))
        if trainer.is_global_zero and self.keep > 0:
            self.prune()

    def prune(self) -> None:
        """Delete all but the `keep` newest of the files that `filename` can have named; `last.ckpt` is none of them."""
        template = re.sub(r"\{[^}]*\}", "{}", self.filename or "{epoch}-{step}")
        pattern = re.compile(r"(?:[\w/]+=)?-?[\d.]+".join(map(re.escape, template.split("{}"))) + re.escape(".ckpt"))
        ours = [path for path in Path(self.dirpath).glob("*.ckpt") if pattern.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: path.stat().st_mtime)[: -self.keep]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def finite(module: torch.nn.Module) -> bool:
    """Whether all trained weights are finite numbers."""
    weights = [p.detach() for p in module.parameters() if p.requires_grad and p.numel()]
    return not weights or bool(torch.stack([norm.float() for norm in torch._foreach_norm(weights)]).isfinite().all())


def checkpoint_callback(directory: Path, settings: dict[str, Any], monitor: str | None, on_signal: str) -> Checkpoints:
    """Periodic checkpoints (`every_n_train_steps` and the like from the yaml) and `last.ckpt`.

    Raises:
        UserError: the yaml has a setting that Lightning's ModelCheckpoint does not take.
    """
    options = {"dirpath": str(directory), "filename": "{epoch:06}", "save_last": True, "verbose": False} | settings
    if "every_n_train_steps" in options and "filename" not in settings:
        options["filename"] = "{step:09}"
        options["auto_insert_metric_name"] = False
    if monitor is not None and "monitor" not in settings:
        options |= {"monitor": monitor, "save_top_k": 3}
    if isinstance(options.get("train_time_interval"), int | float):  # a yaml has no other way to say it
        options["train_time_interval"] = datetime.timedelta(seconds=options["train_time_interval"])
    try:
        return Checkpoints(on_signal, **options)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"yaml: lightning.modelcheckpoint.params: {' '.join(str(error).split())}") from error
