"""One run of the study of training noise: a small model of the tiny world, measured while it learns."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.data.module import EpochSampler
from ldm.data.shapes import HELD_OUT, ShapesDataset
from ldm.evaluation.distances import Statistics, frechet_distance, kernel_distance
from ldm.evaluation.prompt_following import accuracy_of, judge
from ldm.evaluation.quality import FeatureNet
from ldm.evaluation.scene_features import draw_scenes
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config, load_yaml

METHODS: dict[str, dict[str, Any] | None] = {
    "vanilla": None,
    "assignment": {"method": "assignment"},
    "knn": {"method": "knn"},
}


class RememberedText(FrozenCLIPEmbedder):
    """A frozen CLIP text encoder that keeps what it encoded: the tiny world has few captions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, text: str | Sequence[str]) -> torch.Tensor:
        texts = [text] if isinstance(text, str) else list(text)
        new = [caption for caption in dict.fromkeys(texts) if caption not in self.known]
        if new:
            self.known.update(zip(new, super().forward(new).detach().clone(), strict=True))
        return torch.stack([self.known[caption] for caption in texts])


@dataclass(frozen=True)
class Recipe:
    """What all runs of a study share.

    Args:
        config: yaml of the model. steps, batch_size, learning_rate: of the training.
        scenes: of the training set. measurements: points of the curve.
        pictures: drawn at each of them. sampling_steps, scale: of DPM-Solver++, which draws them.
        k: draws a sample, of KNN.
    """

    config: str
    steps: int
    batch_size: int
    learning_rate: float
    scenes: int
    measurements: int
    pictures: int
    sampling_steps: int
    scale: float
    k: int

    def points(self) -> list[int]:
        """The steps after which models are measured, the last one among them."""
        return sorted({round(self.steps * (i + 1) / self.measurements) for i in range(self.measurements)} - {0})


class Bench:
    """What the runs of a study share: encoded scenes, the pictures' prompts, and the features of true pictures."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.features = FeatureNet.pick("tiny", None, device)
        self.truth = self.features.of_tiny_world()
        self.captions = [scene.caption for scene in draw_scenes(recipe.pictures, seed=1)[1]]
        self.samples = encoded(self.build("vanilla", 0).first_stage_model.to(device), recipe.scenes, device)

    def build(self, method: str, seed: int) -> nn.Module:
        """An untrained model whose noise is drawn by `method`."""
        config = load_yaml(self.recipe.config).model
        settings = METHODS[method]
        if settings is not None:
            config.params.noise_config = {
                "target": "ldm.modules.noise.ImmiscibleNoise",
                "params": {**settings, "k": self.recipe.k},
            }
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):  # which would tell nine times what of the tiny model is used
            model = instantiate_from_config(config)
        model.seed, model.learning_rate = seed, self.recipe.learning_rate
        return model

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Train a model and measure it on the way: the curve, the seconds, and the share of them that noise took."""
        from ldm.callbacks import StepBar

        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        for hint in (
            "does not have many workers",
            "isinstance.treespec",
            "in eval mode at the start",
            "no `val_dataloader`",
        ):
            warnings.filterwarnings("ignore", f".*{hint}.*")
        recipe, curve = self.recipe, Curve(self)
        model = self.build(method, seed)
        sampler = EpochSampler(len(self.samples), seed)
        loader = DataLoader(self.samples, batch_size=recipe.batch_size, sampler=sampler, drop_last=True)
        trainer = pl.Trainer(
            max_steps=recipe.steps, max_epochs=-1, accelerator=self.device.type, devices=1, gradient_clip_val=1.0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=[StepBar(), curve],
        )  # fmt: skip
        trainer.fit(model, loader)
        return curve.record()

    def measure(self, model: nn.Module) -> dict[str, float]:
        """FID and KID by the tiny world's features, and prompt accuracy: of all captions, and of unseen pairs."""
        from ldm.inference import txt2img

        recipe = self.recipe
        drawn = txt2img(
            model, self.captions, seed=0, sampler="dpm_solver", steps=recipe.sampling_steps, scale=recipe.scale,
            batch_size=100, exact=False, progress=False,
        )  # fmt: skip
        images = [picture.image for picture in drawn]
        found = self.features.of_images(images)
        judgements = judge(images, self.captions, range(len(images)))
        accuracy = accuracy_of(judgements)
        unseen = [j for j in judgements if any({s, c} <= set(j.caption.split()) for s, c in HELD_OUT)]
        return {
            "fid": frechet_distance(Statistics.of(found), Statistics.of(self.truth)),
            "kid": kernel_distance(found, self.truth)[0],
            "accuracy": accuracy["all"],
            "accuracy_unseen": accuracy_of(unseen)["all"] if unseen else float("nan"),
            **{f"accuracy_{name}": share for name, share in accuracy.items() if name != "all"},
        }


class Curve(pl.Callback):
    """Measures the averaged weights at the points of the recipe; what that takes is not counted as training."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.points, self.due = bench, [], bench.recipe.points()
        self.losses: list[float] = []
        self.noise_seconds, self.measuring, self.began = 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.noise_seconds += module.draw.seconds or 0.0
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step not in self.due:
            return
        start = time.perf_counter()
        module.eval()
        numbers = self.bench.measure(module)
        module.train()
        self.measuring += time.perf_counter() - start
        self.points.append({"step": trainer.global_step, **numbers, "loss": float(np.mean(self.losses))})
        self.losses.clear()
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in list(self.points[-1].items())[:5]))

    def record(self) -> dict[str, Any]:
        """The curve and what it took."""
        seconds = time.perf_counter() - self.began - self.measuring
        return {
            "curve": self.points,
            "training_seconds": round(seconds, 1),
            "measuring_seconds": round(self.measuring, 1),
            "noise_share": self.noise_seconds / seconds,
        }


@torch.no_grad()
def encoded(first_stage: nn.Module, count: int, device: torch.device) -> list[dict[str, Any]]:
    """`count` scenes of training as posterior moments [2C, h, w] and captions."""
    dataset, samples = ShapesDataset(length=count), []
    for first in tqdm(range(0, count, 100), desc="Encoding scenes", unit="batch"):
        items = [dataset[i] for i in range(first, min(first + 100, count))]
        images = torch.from_numpy(np.stack([item["image"] for item in items])).permute(0, 3, 1, 2).contiguous()
        moments = first_stage.encode(images.to(device)).parameters.cpu()
        samples += [{"moments": m, "caption": item["caption"]} for m, item in zip(moments, items, strict=True)]
    return samples
