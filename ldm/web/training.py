"""Training on the page: a run of main_dream_booth.py in a process of its own, watched through what it writes."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.captions import caption_path
from ldm.data.personalized_dream import CLASS_CAPTION, INSTANCE_CAPTION
from ldm.errors import UserError
from ldm.web import limits
from ldm.web.jobs import Job, JobStopped
from ldm.web.studio import Studio, as_jpeg, said

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "main_dream_booth.py"
TINY_CONFIG, TINY_BASE = ROOT / "models/tiny/config.yaml", ROOT / "configs/tiny/dreambooth.yaml"
PHOTO_SIDE = 1024  # photos are kept no larger
GRACE = 120.0  # seconds that a run has to save what it learnt
PRIOR_STEPS, PRIOR_BATCH = 20, 8
SAMPLES, SAMPLE_STEPS = 3, 12  # pictures on the way: enough to see what becomes of it


@dataclass(frozen=True)
class Training:
    """A training that somebody asked for; every value is checked.

    Args:
        photos: PIL images. captions: one a photo, or none at all. prior: images of the class that the model draws
            itself, so that it goes on knowing the class. every: sample pictures every so many steps.
        rate: learning rate; None for the yaml's.
    """

    class_word: str
    photos: list[Any]
    captions: list[str]
    steps: int
    every: int
    prior: int
    seed: int
    rate: float | None

    @classmethod
    def of(cls, studio: Studio, asked: Mapping[str, Any]) -> Training:
        """Check what a browser asked for.

        Raises:
            UserError: something is wrong or too much; in one line for the person in front of the page.
        """
        most = studio.limits
        most.check_room(studio.folder)
        if base_of(studio) is None:
            raise UserError("this model cannot be trained here: start the page with --train_base, a DreamBooth yaml")
        word = limits.class_word(asked["class_word"])
        paths = asked["photos"] or []
        if not 1 <= len(paths) <= most.max_photos:
            raise UserError(f"Photos: {len(paths)} of them; choose 1 to {most.max_photos}")
        captions = [line.strip() for line in limits.text("Captions", asked["captions"], 20_000).splitlines()]
        captions = [line for line in captions if line]
        if captions and len(captions) != len(paths):
            raise UserError(f"Captions: {len(captions)} lines for {len(paths)} photos; give one a photo, or none")
        steps = limits.whole("Steps", asked["steps"], 1, most.max_train_steps)
        return cls(
            word,
            [limits.open_image("Photos", path) for path in paths],
            captions,
            steps,
            limits.whole("Sample every", asked["every"], 1, 100_000),
            limits.whole("Prior images", asked["prior"], 0, 500),
            limits.whole("Seed", asked["seed"], 0, 2**32 - 1),
            limits.number("Learning rate", asked["rate"], 1e-7, 1) if asked["rate"] else None,
        )

    @property
    def prompt(self) -> str:
        """What names the subject."""
        return INSTANCE_CAPTION.format(self.class_word)


def base_of(studio: Studio) -> str | None:
    """The yaml of trainings: --train_base, or the tiny model's for the tiny model."""
    if studio.options.train_base:
        return studio.options.train_base
    return str(TINY_BASE) if is_tiny(studio) else None


def is_tiny(studio: Studio) -> bool:
    """Whether the model is the small one that comes along."""
    return Path(studio.options.config).resolve() == TINY_CONFIG


def start(studio: Studio, training: Training) -> int:
    """Put a training into the queue; returns how many jobs are before it."""
    run = _Run(studio, training)
    return studio.jobs.submit(Job(f"{training.prompt}, {training.steps} steps", run, kind="training"))


class _Run:
    """A job's way through a training."""

    def __init__(self, studio: Studio, training: Training) -> None:
        self.studio, self.training = studio, training
        word = re.sub(r"[^a-z0-9]+", "-", training.class_word.lower()).strip("-") or "subject"
        parent = studio.folder / "trainings"
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            self.folder = parent / f"{word}-{number}"
            try:
                self.folder.mkdir()
                break
            except FileExistsError:
                number += 1
        write_photos(training, self.folder / "photos")

    def __call__(self, job: Job) -> None:
        job.say("drawing prior images", 0.0)
        draw_prior(self.studio, self.training, self.folder / "prior", job)
        job.say("starting", 0.0)
        with open(self.folder / "output.log", "wb") as output:
            process = (
                subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through the page, which keeps its result
                    self.words(), stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        try:
            self.watch(process, job)
        except JobStopped:
            job.say("saving what it has learnt")
            _end(process)
            self.keep(job)
            raise
        finally:
            _end(process)
        if process.returncode:
            raise UserError(f"training: {reason_in(self.folder / 'output.log', process.returncode)}")
        self.keep(job)

    def words(self) -> list[str]:
        """The command line, as a person would type it."""
        training, options = self.training, self.studio.options
        words: list[Any] = [
            sys.executable, PROGRAM, "--base", base_of(self.studio), self.write_overlay(), "-t", "-n", "page",
            "--actual_resume", options.ckpt, "--data_root", self.folder / "photos",
            "--class_word", training.class_word, "--scale_lr", "False", "--no-test",
            "--max_steps", training.steps, "--seed", training.seed, "--logdir", self.folder / "logs",
            "--datadir_in_name", "False",
        ]  # fmt: skip
        if training.prior:
            words += ["--reg_data_root", self.folder / "prior"]
        return [str(word) for word in words]

    def write_overlay(self) -> Path:
        """What this training says otherwise than the yaml, as a yaml."""
        from omegaconf import OmegaConf

        from ldm.util import load_yaml

        training = self.training
        pictures = {"batch_frequency": training.every, "max_images": SAMPLES, "increase_log_steps": False}
        pictures |= {"prompts": [training.prompt] * SAMPLES}
        pictures |= {"log_images_kwargs": {"unconditional_guidance_scale": 3.0, "steps": SAMPLE_STEPS}}
        log = {"save_dir": str(self.folder), "name": "", "version": "log", "flush_logs_every_n_steps": 1}
        overlay: dict[str, Any] = {
            "lightning": {
                "trainer": {"log_every_n_steps": 1},
                "modelcheckpoint": {"params": {"every_n_train_steps": training.steps, "save_top_k": 0}},
                "callbacks": {"image_logger": {"target": "main_dream_booth.ImageLogger", "params": pictures}},
                "logger": {"target": "pytorch_lightning.loggers.CSVLogger", "params": log},
            }
        }
        if training.rate:
            overlay["model"] = {"base_learning_rate": training.rate}
        config = load_yaml(base_of(self.studio))
        schedule = OmegaConf.select(config, "model.params.scheduler_config.params") or {}
        if "max_decay_steps" in schedule:
            rise = min(schedule.get("warm_up_steps", 0), training.steps // 4)
            part = {"max_decay_steps": training.steps, "warm_up_steps": rise}
            overlay.setdefault("model", {})["params"] = {"scheduler_config": {"params": part}}
        path = self.folder / "training.yaml"
        OmegaConf.save(OmegaConf.create(overlay), path)
        return path

    def watch(self, process: subprocess.Popen, job: Job) -> None:
        """Tell how far it is until it ends."""
        steps, began, shown = self.training.steps, None, None
        while process.poll() is None:
            time.sleep(0.25)
            job.heed(picture_done=True)
            losses = read_losses(self.folder / "log" / "metrics.csv")
            if losses and losses != job.losses:
                began = began or (time.monotonic(), losses[-1][0])
                job.losses = losses
                step = losses[-1][0]
                line = f"step {step} of {steps}, loss {losses[-1][1]:.4f}"
                if step > began[1]:
                    left = (time.monotonic() - began[0]) / (step - began[1]) * (steps - step)
                    line += f", {said(left)} left"
                job.say(line, step / steps)
            newest = newest_sample(self.folder)
            if newest != shown:
                shown = newest
                job.preview = read_preview(newest) or job.preview
                job.changed()
        job.losses = read_losses(self.folder / "log" / "metrics.csv") or job.losses

    def keep(self, job: Job) -> None:
        """Move the newest adapters to the shelf, and drop the run's checkpoints of the whole model."""
        found = sorted(self.folder.glob("logs/*/checkpoints/*-adapters"), key=lambda p: int(p.name.split("-")[0]))
        if not found:
            return
        step = found[-1].name.split("-")[0]
        own = self.studio.shelf.own
        own.mkdir(parents=True, exist_ok=True)
        name = f"{self.folder.name} ({step} steps)"
        os.replace(found[-1], own / name)
        for checkpoint in self.folder.glob("logs/*/checkpoints/*.ckpt"):
            checkpoint.unlink()
        job.results.append(name)
        job.changed()


def write_photos(training: Training, folder: Path) -> None:
    """The photos as PNG, on white and no larger than is of use, and their captions beside them."""
    from ldm.images import on_white

    folder.mkdir()
    for i, photo in enumerate(training.photos):
        photo = on_white(photo)
        photo = limits.fitted(photo, PHOTO_SIDE) if max(photo.size) > PHOTO_SIDE else photo
        path = folder / f"{i:03}.png"
        photo.save(path)
        if training.captions:
            caption_path(path).write_text(training.captions[i] + "\n", encoding="utf-8")


def draw_prior(studio: Studio, training: Training, folder: Path, job: Job) -> None:
    """Images of the class by the model as it is, without guidance: what its loss already fits, and holds on to."""
    from ldm.inference import txt2img
    from ldm.modules.pictures import save_picture

    if not training.prior:
        return
    studio.wear({})
    prompts = prior_prompts(studio, training)
    for first in range(0, len(prompts), PRIOR_BATCH):
        job.heed(picture_done=True)
        batch = prompts[first : first + PRIOR_BATCH]
        drawn = txt2img(studio.model, batch, seed=training.seed + first, steps=PRIOR_STEPS, sampler="dpm_solver",
                        scale=1.0, exact=False, batch_size=PRIOR_BATCH, protection=studio.protection,
                        precision=studio.options.precision, progress=False, callback=lambda _: job.heed())  # fmt: skip
        for i, (picture, prompt) in enumerate(zip(drawn, batch, strict=True), first):
            path = folder / f"{i:05}.png"
            save_picture(picture.image, path)
            caption_path(path).write_text(f"{prompt}\n", encoding="utf-8")
        done = first + len(batch)
        job.say(f"drawing prior images, {done} of {len(prompts)}", done / len(prompts))


def prior_prompts(studio: Studio, training: Training) -> list[str]:
    """The class's caption; for the tiny model, whose world is small, also its other scenes."""
    if is_tiny(studio):
        from ldm.evaluation import personalization

        return personalization.prior_prompts(training.class_word, training.prior)
    return [CLASS_CAPTION.format(training.class_word)] * training.prior


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) from a metrics.csv that is being written."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    losses = []
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        value = row.get("train/loss") or row.get("train/loss_step")
        try:
            losses.append((int(row["step"]) + 1, float(value)))
        except (KeyError, TypeError, ValueError):  # a row of other numbers
            continue
    return losses


def newest_sample(folder: Path) -> Path | None:
    """The latest picture of the subject's prompt that a run has drawn."""
    return max(folder.glob("logs/*/images/train/prompts_samples_gs-*.png"), key=lambda p: p.name, default=None)


def read_preview(path: Path | None) -> bytes:
    """A picture for the page; nothing while there is none."""
    from PIL import Image

    if path is None:
        return b""
    with Image.open(path) as image:
        return as_jpeg(image)


def reason_in(log: Path, code: int) -> str:
    """What a run said of its end."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"it ended with exit code {code}; {log} says more"


def _end(process: subprocess.Popen) -> None:
    """Ask a run to save and end, and wait for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
