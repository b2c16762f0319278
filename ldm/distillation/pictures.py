"""What is to be seen of a Flash student while it is trained: pictures beside the teacher's, and the LoRA's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.signals import Stopped

STUDENT_STEPS = (4, 2, 1)


@torch.no_grad()
def side_by_side(
    flash: pl.LightningModule,
    batch: dict,
    N: int = 8,
    teacher_steps: int = 25,
    unconditional_guidance_scale: float = 3.0,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    """Pictures [N, 3, H, 4 W] in [-1, 1]: the teacher's with guidance, then the student's in 4, 2 and 1 steps.

    All from the noises of the seeds `seed`, seed + 1, ..., of the batch's captions or of `prompts`.
    """
    from ldm.modules.pictures import log_txt_as_img

    teacher, student = flash.seen_teacher, flash.seen_student
    batch = {key: value[:N] for key, value in batch.items()}
    words = teacher.words(batch, prompts)
    columns = [teacher.draw(words, batch, teacher_steps, unconditional_guidance_scale, seed=seed)]
    with flash.evaluation_scope():
        columns += [student.draw(words, batch, steps, seed=seed) for steps in STUDENT_STEPS]
    name = f"teacher_{teacher_steps}_student_{'_'.join(map(str, STUDENT_STEPS))}"
    return {name: torch.cat(columns, dim=3), "conditioning": log_txt_as_img(columns[0].shape[2:], words)}


class LoraFile(Callback):
    """Writes `<checkpoints>/<step>-lora.safetensors` as often as checkpoints, at the end, and at a signal."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, trainer: pl.Trainer, flash: pl.LightningModule) -> None:
        """Save the LoRA of the present step, once."""
        step = trainer.global_step
        if not trainer.is_global_zero or step in (0, self.written) or trainer.checkpoint_callback is None:
            return
        path = Path(trainer.checkpoint_callback.dirpath) / f"{step}-lora.safetensors"
        with flash.evaluation_scope():  # averaged, where there is an average
            flash.seen_student.write_lora(path)
        self.written = step
        print(f"\nLoRA of step {step}: {path}")

    def on_train_batch_end(self, trainer: pl.Trainer, flash: pl.LightningModule, *args: Any) -> None:
        every = getattr(trainer.checkpoint_callback, "_every_n_train_steps", 0)
        if every and trainer.global_step % every == 0:
            self.write(trainer, flash)

    def on_train_end(self, trainer: pl.Trainer, flash: pl.LightningModule) -> None:
        self.write(trainer, flash)

    def on_exception(self, trainer: pl.Trainer, flash: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            self.write(trainer, flash)
