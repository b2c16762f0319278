"""One subject of the tiny world, its photos and prior images, and a base model that is tuned on them by any method."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import artefacts
from ldm.data.personalized_dream import SUBJECT
from ldm.data.subjects import CLASS_WORD, write_subject_photos
from ldm.evaluation import personalization as people
from ldm.evaluation.records import Records, digests
from ldm.inference import load_model
from ldm.modules.pictures import save_picture
from ldm.personalize import Result, personalise

PHOTOS = 5


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Args:
        subject: `ldm.data.subjects` names them. steps: of training.
        prior_images: drawn by the untuned model, of the class, of other scenes and of no prompt.
        pictures, others: how many of the subject and of other prompts are compared. sampling_steps: of each.
        base: yaml of the training. config, ckpt: the model.
    """

    subject: str = "ball"
    steps: int = 300
    prior_images: int = 96
    pictures: int = 25
    others: int = 100
    sampling_steps: int = 20
    base: str = "configs/tiny/dreambooth.yaml"
    config: str = "models/tiny/config.yaml"
    ckpt: str = "models/tiny/model.safetensors"

    def prompts(self, subject: str = SUBJECT) -> dict[str, list[str]]:
        """What prior images are drawn for, and what models are compared on, calling the subject `subject`.

        Raises:
            UserError: some of the latter would be trained on, see `personalization.check_apart`.
        """
        prior = people.prior_prompts(CLASS_WORD, self.prior_images)
        others = people.other_prompts(self.others)
        people.check_apart(prior, others)
        return {"prior": prior, "subject": people.subject_prompts(CLASS_WORD, self.pictures, subject), "others": others}

    def record(self) -> dict[str, Any]:
        """For a trial's record: these settings, what the files hold, and the prompts."""
        files = {name: getattr(self, name) for name in ("base", "config", "ckpt")}
        return {**asdict(self), **digests(files), "prompts": self.prompts()}


class Bench:
    """One seed's photos, prior images, and pictures of the untuned model.

    Args:
        folder: where they are kept, for the next bench of this seed, and where training runs lie until they are
            measured.
    """

    def __init__(self, setting: Setting, seed: int, folder: str | Path) -> None:
        self.setting, self.seed, self.folder = setting, seed, Path(folder)
        self.sampling = people.Sampling(steps=setting.sampling_steps)
        self.photo_folder, self.prior = self.folder / setting.subject, self.folder / "prior"
        self.model = load_model(setting.config, setting.ckpt, "cpu")
        self.whole = sum(p.numel() for p in self.model.model.diffusion_model.parameters())
        self.prompts = setting.prompts()
        prior = self.prompts.pop("prior")
        self._make(prior)
        self.photos = self._pictures(setting.subject)
        self.before = people.Pictures(**{name: self._pictures(name) for name in self.prompts})

    def _pictures(self, name: str) -> list[Image.Image]:
        return [Image.open(path).convert("RGB") for path in sorted((self.folder / name).glob("*.png"))]

    def _make(self, prior: Sequence[str]) -> None:
        """Write photos, prior images and what the untuned model draws, where they are not there yet."""
        training = ("steps", "base", "base_sha256")  # say nothing of these pictures
        settings = {k: v for k, v in self.setting.record().items() if k not in training} | {"seed": self.seed}
        records = Records(self.folder)
        if records.kept("bench", settings):
            return
        for name in (self.setting.subject, "prior", *self.prompts):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        write_subject_photos(self.photo_folder, self.setting.subject, PHOTOS, self.seed)
        people.write_prior_images(self.model, prior, self.prior, 1000 * (self.seed + 1), self.sampling)
        for name, images in vars(self.draw()).items():
            for i, image in enumerate(images):
                save_picture(image, self.folder / name / f"{i:05}.png")
        records.keep("bench", settings, {})

    def draw(self, files: Iterable[str | Path] = ()) -> people.Pictures:
        """What the model draws for all prompts with a personalisation's `files`, always from the same noises.

        Prompts call the subject by the new word, where there is one. Then the model is as it was.
        """
        found = artefacts.use(self.model, dict.fromkeys(map(os.fspath, files), 1.0))
        words = " ".join(word for one in found for word in one.words)
        prompts = self.prompts | {"subject": self.setting.prompts(words or SUBJECT)["subject"]}
        try:
            seed = 100_000 * (self.seed + 1)
            return people.Pictures.of(self.model, **prompts, seed=seed, sampling=self.sampling)
        finally:
            artefacts.use(self.model, {})

    def train(
        self,
        name: str,
        words: Sequence[str] = (),
        base: str | None = None,
        steps: int | None = None,
        **more: Any,
    ) -> Result:
        """Tune the model, with overrides `words`, in `<folder>/runs/<name>`.

        Args:
            base, steps: other than the setting's. more: for `ldm.personalize.personalise`.
        """
        folder, steps = self.folder / "runs" / name, steps or self.setting.steps
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [
            f"model.params.scheduler_config.params.max_decay_steps={steps}", "lightning.best_step=null",
            "lightning.callbacks.image_logger.params.disabled=true",
            f"lightning.modelcheckpoint.params.every_n_train_steps={steps}", *words,
        ]  # fmt: skip
        return personalise(
            base or self.setting.base, self.setting.ckpt, self.photo_folder, CLASS_WORD, priors=self.prior,
            steps=steps, seed=self.seed, name=name, logdir=folder, overrides=overrides, **more,
        )  # fmt: skip

    def compare(self, after: people.Pictures) -> dict[str, float]:
        """The numbers of `personalization.compare`."""
        return people.compare(self.photos, self.before, after, **self.prompts)

    def sheet(self, after: people.Pictures, title: str) -> Image.Image:
        """Photos, and pictures before and after, for people to look at."""
        return people.comparison_sheet(self.photos, self.before, after, **self.prompts, title=title)
