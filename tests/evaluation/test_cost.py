"""What a training costs: processor time and memory of its steps, and not of what came before."""

from __future__ import annotations

import time

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.evaluation.cost import training_meter

MIB, STEPS, BUSY = 2**20, 4, 0.05


class Hoarder(pl.LightningModule):
    """Works for `BUSY` seconds and keeps 16 MiB more in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.kept: list[torch.Tensor] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.kept.append(torch.ones(4 * MIB))
        end = time.process_time() + BUSY
        while time.process_time() < end:
            pass
        return (self.weight * batch).sum()


def test_only_the_steps_are_counted() -> None:
    meter, before = training_meter(), torch.ones(16 * MIB)  # 64 MiB that were there already
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=[meter], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(Hoarder(), DataLoader(torch.ones(STEPS, 1)))
    assert STEPS * BUSY <= meter.seconds <= time.process_time() - start
    assert STEPS * 16 * MIB <= meter.bytes < STEPS * 16 * MIB + 32 * MIB and len(before)
