"""FID and KID of a model's samples against its training images, while it trains."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from ldm.errors import UserError
from ldm.evaluation.distances import Statistics
from ldm.evaluation.quality import FEATURES, FeatureNet, Reference, distances
from ldm.k_diffusion.pixels import PixelSampler, as_pictures
from ldm.models.diffusion.trainer import noises
from ldm.signals import PicturesAbandoned, abandon_pictures, watch

FILE = "distances.csv"  # in the run's folder: a line a measurement


class DistanceLogger(Callback):
    """Measures the averaged weights before the first step and every so many steps: in the log and in `FILE`.

    Scores bear the name of the features that they are measured by: Inception's, which published ones are, or those of
    the small net that comes with the repository, which rank models of the same data but compare with nothing else.

    Args:
        every_n_train_steps: how often. samples: how many are drawn. references: training images, at most.
        features: `inception`, `tiny`, or `auto`: Inception where its weights are at hand.
        inception: file of its weights.
        sampling: how samples are drawn, see `PixelSampler`. batch_size: at a time. seed: of the first one.
    """

    def __init__(
        self,
        every_n_train_steps: int = 10_000,
        samples: int = 2000,
        references: int = 10_000,
        features: str = "auto",
        inception: str | None = None,
        batch_size: int = 64,
        sampling: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("samples", samples)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"yaml: lightning.callbacks: {name} is {value!r}; it must be a whole number above 0")
        if features not in FEATURES:
            raise UserError(f"yaml: lightning.callbacks: features is {features!r}; it may be {', '.join(FEATURES)}")
        self.every, self.count, self.references = every_n_train_steps, samples, references
        self.features, self.inception = features, inception
        self.how, self.batch_size, self.seed = PixelSampler.of(sampling), batch_size, seed
        self.net: FeatureNet | None = None
        self.reference: Reference | None = None
        self.last = -1  # the step of the last measurement

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.last = trainer.global_step or -1  # a resumed run measured that step before
        if trainer.is_global_zero:
            self.net = FeatureNet.pick(self.features, self.inception, module.device)
            self.reference = self.of_training_set(trainer, module)
            self.measure(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            self.measure(trainer, module)

    def of_training_set(self, trainer: pl.Trainer, module: pl.LightningModule) -> Reference:
        """What samples are compared with: training images, as the model sees them but for augmentation.

        Raises:
            UserError: there is no set of images to choose from.
        """
        dataset = trainer.datamodule.datasets["train"]
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise UserError("yaml: lightning.callbacks: distances need a training set of known length")
        count, key = min(len(dataset), self.references), module.first_stage_key
        pictures: list[Image.Image] = []
        places = np.random.default_rng(self.seed).permutation(len(dataset))[:count].tolist()
        for first in range(0, count, self.batch_size):
            arrays = [dataset[place][key] for place in places[first : first + self.batch_size]]
            batch = {key: torch.from_numpy(np.stack(arrays))}
            pictures += as_pictures(module.get_input(batch, key))
        found = self.net.of_images(pictures)
        return Reference(Statistics.of(found), found)

    @torch.no_grad()
    def draw(self, module: pl.LightningModule) -> list[Image.Image]:
        """The samples."""
        pictures: list[Image.Image] = []
        for first in range(0, self.count, self.batch_size):
            generators = noises(self.seed + first, min(self.batch_size, self.count - first))
            pictures += as_pictures(module.sample(generators, self.how, abandon_pictures))
        return pictures

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw, compare, and write down; once a step. A signal that comes ends it."""
        step, was_training = trainer.global_step, module.training
        if step == self.last or watch.caught:
            return
        self.last = step
        module.eval()
        try:
            with module.evaluation_scope():
                scores = distances(self.net.of_images(self.draw(module)), self.reference, self.net.name)
        except PicturesAbandoned:
            return
        finally:
            module.train(was_training)
        tqdm.write(f"Step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if trainer.logger is not None:
            trainer.logger.log_metrics(scores, step)
        write_row(Path(trainer.default_root_dir) / FILE, {"step": step, **scores})


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a table on disk, which begins with the columns' names."""
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
