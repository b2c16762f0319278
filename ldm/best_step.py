"""The best step of a personalisation: the most similar to the photos of those that leave other prompts as they were."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback

from ldm.data.base import open_image
from ldm.data.personalized_dream import SUBJECT
from ldm.evaluation.judges import judge_of
from ldm.evaluation.ranking import best_of
from ldm.modules.pictures import save_picture
from ldm.signals import watch
from ldm.util import UserError, atomic_path

SCORES, BEST = "scores.jsonl", "best.json"


@dataclass(frozen=True)
class BestStepConfig:
    """What `lightning.best_step` says.

    Args:
        features: `tiny-world`, or a folder or hub name of CLIP or DINO.
        subject: how many pictures of the subject are drawn, others: how many of other prompts.
        most_drift: how much drift is allowed; None for what the features' judge takes as little.
        steps, scale: of DPM-Solver++.

    Raises:
        UserError: there is an unknown word, no features, or a value that cannot be.
    """

    features: str
    subject: int = 8
    others: int = 16
    most_drift: float | None = None
    steps: int = 20
    scale: float = 7.5

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> BestStepConfig:
        """That of a yaml."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(section) - set(known))
        if unknown or not section.get("features"):
            what = f"'{unknown[0]}' is none of {', '.join(known)}" if unknown else "features is missing"
            raise UserError(f"yaml: lightning.best_step: {what}")
        config, where = cls(**section), "yaml: lightning.best_step"
        if type(config.features) is not str:
            raise UserError(f"{where}.features is {config.features!r}; it must be tiny-world, or a folder or hub name")
        for name in ("subject", "others", "steps"):
            value = getattr(config, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{where}.{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("scale",) if config.most_drift is None else ("scale", "most_drift"):
            value = getattr(config, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise UserError(f"{where}.{name} is {value!r}; it must be a finite number")
        return config


@dataclass(frozen=True)
class Score:
    """How a step's pictures are."""

    step: int
    similarity: float
    drift: float


class BestStep(Callback):
    """Scores the model as often as its results are written, and keeps those of the best step as `best-...`.

    Scores are in `<run>/scores.jsonl`, pictures in `<run>/images/best_step`; a resumed run goes on with both.

    Args:
        folder: of the run. photos: the folder of the subject's photos. class_word, subject: what prompts call it.
        every_n_train_steps: steps between two looks; there is one at the end, too.
        seed: of the first picture.
    """

    def __init__(
        self,
        config: BestStepConfig,
        folder: Path,
        photos: Path,
        class_word: str,
        every_n_train_steps: int,
        subject: str = SUBJECT,
        seed: int = 0,
    ) -> None:
        self.config, self.folder, self.every, self.seed = config, Path(folder), every_n_train_steps, seed
        self.judge = judge_of(config.features)
        self.most_drift = self.judge.most_drift if config.most_drift is None else config.most_drift
        self.photos = [open_image(path) for path in photo_files(photos)]
        self.prompts = self.judge.subject_prompts(class_word, config.subject, subject)
        self.others = self.judge.other_prompts(config.others)
        self.scores: list[Score] = []

    def draw(self, module: pl.LightningModule, prompts: Sequence[str], seed: int) -> list[Image.Image]:
        """Pictures of prompts; picture i has the seed `seed` + i."""
        from ldm.inference import Protection, txt2img

        was_training = module.training
        module.eval()
        try:
            pictures = txt2img(
                module, prompts, seed=seed, sampler="dpm_solver", steps=self.config.steps, scale=self.config.scale,
                exact=False, progress=False, protection=Protection(),
            )  # fmt: skip
        finally:
            module.train(was_training)
        return [picture.image for picture in pictures]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw other prompts before anything is learnt, or read what a resumed run drew then."""
        if not trainer.is_global_zero:
            return
        kept = [self.folder / "images" / "best_step" / f"before-{i:03}.png" for i in range(len(self.others))]
        if not all(path.is_file() for path in kept):
            if trainer.global_step:
                raise UserError(f"--resume: '{kept[0].parent}' lacks pictures of the beginning, for the best step")
            for path, image in zip(kept, self.draw(module, self.others, self.seed + len(self.prompts)), strict=True):
                save_picture(image, path)
        self.before = [open_image(path) for path in kept]
        self.scores = [score for score in read_scores(self.folder) if score.step <= trainer.global_step]

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score the present step, once."""
        step = trainer.global_step
        seen = not trainer.is_global_zero or step == 0 or any(score.step == step for score in self.scores)
        if seen or watch.caught:
            return
        pictures = self.draw(module, self.prompts, self.seed)
        after = self.draw(module, self.others, self.seed + len(self.prompts))
        for i, picture in enumerate(pictures):
            save_picture(picture, self.folder / "images" / "best_step" / f"step-{step:06}-{i:03}.png")
        score = Score(
            step, self.judge.similarity(pictures, self.photos), self.judge.drift(self.before, after, self.others)
        )
        self.scores.append(score)
        with atomic_path(self.folder / SCORES) as temporary:
            temporary.write_text("".join(json.dumps(asdict(one)) + "\n" for one in self.scores), encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_metrics({"best_step/similarity": score.similarity, "best_step/drift": score.drift}, step)
        print(f"\nStep {step}: similarity {score.similarity:.3f}, drift {score.drift:+.3f} ({self.judge.unit})")
        if best_of(self.scores, self.most_drift) == score:
            keep_best(self.folder / "checkpoints", step)
            with atomic_path(self.folder / "checkpoints" / BEST) as temporary:
                temporary.write_text(json.dumps(asdict(score)) + "\n", encoding="utf-8")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.look(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.look(trainer, module)
        if self.scores:
            best = best_of(self.scores, self.most_drift)
            among = self.judge.similarity(self.photos, self.photos)
            print(
                f"Best step: {best.step} of {trainer.global_step}: similarity {best.similarity:.3f} (photo to photo "
                f"{among:.3f}), drift {best.drift:+.3f} (up to {self.most_drift:g} is little); it is kept as "
                f"{self.folder / 'checkpoints' / 'best-...'}"
            )


def best_of_run(folder: Path) -> Score | None:
    """The best step of a run; None where none was looked for."""
    path = folder / "checkpoints" / BEST
    return Score(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def photo_files(folder: Path) -> list[Path]:
    """The photos of a folder that can be read."""
    from ldm.data.base import ImageFolder

    return ImageFolder(folder).paths


def read_scores(folder: Path) -> list[Score]:
    """What a run has scored so far."""
    path = folder / SCORES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Score(**json.loads(line)) for line in lines]


def keep_best(checkpoints: Path, step: int) -> None:
    """Copy what lies as `<step>-...` to `best-...`."""
    for path in checkpoints.glob(f"{step}-*"):
        target = checkpoints / path.name.replace(f"{step}-", "best-", 1)
        if path.is_dir():
            with tempfile.TemporaryDirectory(dir=checkpoints, prefix=".best") as beside:
                shutil.copytree(path, Path(beside) / "new")
                shutil.rmtree(target, ignore_errors=True)
                (Path(beside) / "new").rename(target)
        else:
            with atomic_path(target) as temporary:
                shutil.copyfile(path, temporary)
