"""One subject of the tiny world, its photos and prior images, and a base model that is tuned on them by any method."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ldm.data.subjects import CLASS_WORD, write_subject_photos
from ldm.evaluation import personalization as people
from ldm.evaluation.records import digests
from ldm.inference import load_model

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

    def prompts(self) -> dict[str, list[str]]:
        """What prior images are drawn for, and what models are compared on.

        Raises:
            UserError: some of the latter would be trained on, see `personalization.check_apart`.
        """
        prior = people.prior_prompts(CLASS_WORD, self.prior_images)
        others = people.other_prompts(self.others)
        people.check_apart(prior, others)
        return {"prior": prior, "subject": people.subject_prompts(CLASS_WORD, self.pictures), "others": others}

    def record(self) -> dict[str, Any]:
        """For a trial's record: these settings, what the files hold, and the prompts."""
        files = {name: getattr(self, name) for name in ("base", "config", "ckpt")}
        return {**asdict(self), **digests(files), "prompts": self.prompts()}


class Bench:
    """One seed's photos, prior images, and pictures of the untuned model.

    Args:
        folder: where photos and prior images are written, and training runs until they are measured.
    """

    def __init__(self, setting: Setting, seed: int, folder: str | Path) -> None:
        self.setting, self.seed, self.folder = setting, seed, Path(folder)
        self.sampling = people.Sampling(steps=setting.sampling_steps)
        self.photo_folder, self.prior = self.folder / setting.subject, self.folder / "prior"
        paths = write_subject_photos(self.photo_folder, setting.subject, PHOTOS, seed)
        self.photos = [Image.open(path).convert("RGB") for path in paths]
        self.model = load_model(setting.config, setting.ckpt, "cpu")
        self.whole = sum(p.numel() for p in self.model.model.diffusion_model.parameters())
        self.prompts = setting.prompts()
        prior = self.prompts.pop("prior")
        people.write_prior_images(self.model, prior, self.prior, 1000 * (seed + 1), self.sampling)
        self.before = self.draw(self.model)

    def draw(self, model: nn.Module) -> people.Pictures:
        """A model's pictures of all prompts, always from the same noises."""
        return people.Pictures.of(model, **self.prompts, seed=100_000 * (self.seed + 1), sampling=self.sampling)

    def train(self, main: Callable[[list[str]], None], name: str, words: Sequence[str] = ()) -> tuple[Path, float]:
        """Tune the model by `main`, main_dream_booth's, with overrides and flags `words`.

        Returns:
            The run's checkpoints, and the seconds of training, start of the trainer included.
        """
        steps, folder = self.setting.steps, self.folder / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        main([
            "--base", self.setting.base, f"model.params.scheduler_config.params.max_decay_steps={steps}",
            "lightning.callbacks.image_logger.params.disabled=true",
            f"lightning.modelcheckpoint.params.every_n_train_steps={steps}", *words,
            "-t", "--scale_lr", "False", "--actual_resume", self.setting.ckpt, "-n", name, "-l", str(folder),
            "--data_root", str(self.photo_folder), "--reg_data_root", str(self.prior), "--class_word", CLASS_WORD,
            "--max_steps", str(steps), "--seed", str(self.seed),
        ])  # fmt: skip
        (run,) = folder.iterdir()
        return run / "checkpoints", time.perf_counter() - start

    def with_adapters(self, directory: Path) -> tuple[people.Pictures, int]:
        """What the model draws with adapters in it, and how many parameters they have; then it is as it was."""
        from ldm.modules import adapters

        unet = self.model.model.diffusion_model
        unet.load_adapter_from_dir(directory)
        count = sum(p.numel() for p in adapters.adapter_parameters(unet))
        after = self.draw(self.model)
        adapters.eject(unet)
        return after, count

    def compare(self, after: people.Pictures) -> dict[str, float]:
        """The numbers of `personalization.compare`."""
        return people.compare(self.photos, self.before, after, **self.prompts)

    def sheet(self, after: people.Pictures, title: str) -> Image.Image:
        """Photos, and pictures before and after, for people to look at."""
        return people.comparison_sheet(self.photos, self.before, after, **self.prompts, title=title)
