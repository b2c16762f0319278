"""What is to be seen of a Flash student while it is trained: pictures beside the teacher's, and the LoRA's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.exchange import lora as files
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.trainer import noises
from ldm.modules import lora
from ldm.signals import Stopped, abandon_pictures

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

    teacher, student = flash.teacher, flash.student
    batch = {key: value[:N] for key, value in batch.items()}
    raw = teacher.get_condition(batch) if not prompts else teacher.conditions_of(prompts, batch)
    count = len(raw)
    shape = teacher.get_latents(batch).shape[1:]
    c = teacher.complete_condition(teacher.get_learned_conditioning(raw), batch)

    def draw(sampler: Any, steps: int, **guidance: Any) -> torch.Tensor:
        samples, _ = sampler.sample(
            steps, count, shape, c, generator=noises(seed, count), callback=abandon_pictures, verbose=False,
            show_progress=False, **guidance,
        )  # fmt: skip
        return teacher.decode_first_stage(samples)

    empty = teacher.complete_condition(teacher.get_unconditional_conditioning(count), batch)
    guidance = dict(unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=empty)
    columns = [draw(DPMSolverSampler(teacher), teacher_steps, **guidance)]
    with flash.evaluation_scope():
        columns += [draw(LCMSampler(student), steps) for steps in STUDENT_STEPS]
    name = f"teacher_{teacher_steps}_student_{'_'.join(map(str, STUDENT_STEPS))}"
    return {name: torch.cat(columns, dim=3), "conditioning": log_txt_as_img(columns[0].shape[2:], raw)}


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
        write_lora(flash, path)
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


def write_lora(flash: pl.LightningModule, path: Path) -> None:
    """Save a student's LoRA, averaged where it is."""
    with flash.evaluation_scope():
        weights = {f"model.diffusion_model.{k}": v for k, v in lora.weights_of(flash.seen_student.network).items()}
        files.write(weights, flash.teacher_config["params"], path)
