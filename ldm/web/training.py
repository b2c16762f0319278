"""Training on the page: `ldm.personalize.personalise` in a process of its own, watched through what it writes."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.data.captions import caption_path
from ldm.data.personalized_dream import CLASS_CAPTION, SUBJECT, caption_of
from ldm.errors import UserError
from ldm.util import atomic_path
from ldm.web import learner, limits
from ldm.web.jobs import Job, JobStopped
from ldm.web.studio import Studio, as_jpeg, said
from ldm.web.ways import Way

ROOT = Path(__file__).resolve().parents[2]
TINY_CONFIG = ROOT / "models/tiny/config.yaml"
PHOTO_SIDE = 1024  # photos are kept no larger
GRACE = 300.0  # seconds that a run has to save what it learnt
SAMPLES, SAMPLE_STEPS = 4, 12  # pictures on the way: enough to see what becomes of it
ROWS = 6  # of them on the page: the first, to compare with, and the newest


@dataclass(frozen=True)
class Training:
    """A training that somebody asked for; every value is checked.

    Args:
        way: how it is learnt. photos: PIL images. captions: one a photo, or none at all.
        prior: images of the class that the model draws itself, so that it goes on knowing the class.
        every: sample pictures every so many steps. rate: learning rate; None for the yaml's.
    """

    way: Way
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
        studio.jobs.check_room()
        if not studio.ways:
            raise UserError("this model cannot be trained here: start the page with --train_base, a DreamBooth yaml")
        check_model(studio.options)
        way = studio.ways[limits.choice("How it is learnt", asked["way"], list(studio.ways))]
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
            way,
            word,
            [_photo(path) for path in paths],
            captions,
            steps,
            limits.whole("Sample every", asked["every"], 1, 100_000),
            limits.whole("Prior images", asked["prior"], 0, 500),
            limits.whole("Seed", asked["seed"], 0, 2**32 - 1),
            limits.number("Learning rate", asked["rate"], 1e-7, 1) if asked["rate"] else None,
        )


def check_model(options: argparse.Namespace) -> None:
    """Raise UserError where a training, which reads --ckpt anew, would refuse it or be of another model."""
    from ldm import checkpoint, hub

    if options.vae:
        raise UserError("trainings know only the autoencoder in --ckpt: start the page without --vae to train")
    if options.allow_pickle:
        checkpoint.check_file(hub.find_checkpoint(options.ckpt))


def _photo(path: Any) -> Any:
    """A photo on white, no larger than is of use."""
    from ldm.images import on_white

    photo = limits.open_image("Photos", path)
    return on_white(limits.fitted(photo, PHOTO_SIDE) if max(photo.size) > PHOTO_SIDE else photo)


def is_tiny(studio: Studio) -> bool:
    """Whether the model is the small one that comes along."""
    return Path(studio.options.config).resolve() == TINY_CONFIG


def start(studio: Studio, training: Training) -> int:
    """Put a training into the queue; returns how many jobs are before it."""
    run = _Run(studio, training)
    title = f"{run.prompt}, {training.way.title}, {training.steps} steps"
    return studio.jobs.submit(Job(title, run, kind="training"))


class _Run:
    """A job's way through a training."""

    def __init__(self, studio: Studio, training: Training) -> None:
        self.studio = studio
        self.folder = _new_folder(studio, training.class_word)
        write_photos(training, self.folder / "photos")
        self.training = replace(training, photos=[])  # jobs may wait for long
        self.subject = f"<{self.folder.name}>" if training.way.word else SUBJECT
        self.prompt = caption_of(training.class_word, self.subject)

    def __call__(self, job: Job) -> str:
        job.say("preparing", 0.0)
        draw_priors(self.studio, self.training, self.folder / "priors", job)
        job.say("starting", 0.0)
        self.write_settings()
        words = [sys.executable, "-m", "ldm.web.learner", str(self.folder)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with open(self.folder / "output.log", "wb") as output:
            process = (
                subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through the page, which keeps its result
                    words, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        try:
            self.watch(process, job)
        except JobStopped as stop:
            self.stop(process, job)
            raise JobStopped(f"stopped; {self.keep(job)}" if job.losses else "stopped") from stop
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise UserError(f"training: {reason_in(self.folder / 'output.log', process.returncode)}")
        return self.keep(job)

    def write_settings(self) -> None:
        """What `learner` passes to `ldm.personalize.personalise`."""
        from ldm import hub

        training, device = self.training, self.studio.model.device
        where = ["--accelerator", {"cuda": "gpu"}.get(device.type, device.type)]
        where += ["--devices", f"{device.index},"] if device.index is not None else []
        flags = [*where, "--no-test", "--datadir_in_name", "False", "--validation_prompts", *[self.prompt] * SAMPLES]
        settings = {
            "base": training.way.base,
            "ckpt": hub.find_checkpoint(self.studio.options.ckpt),
            "photos": self.folder / "photos",
            "class_word": training.class_word,
            "priors": self.folder / "priors" if training.prior else None,
            "num_priors": 0,  # they are there
            "steps": training.steps,
            "seed": training.seed,
            "logdir": self.folder / "logs",
            "overrides": self.overrides(),
            "flags": [*(["--placeholder_string", self.subject] if training.way.word else []), *flags],
        }
        with atomic_path(self.folder / learner.SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=1, default=str) + "\n", encoding="utf-8")

    def overrides(self) -> list[str]:
        """What this training says otherwise than its yaml."""
        from omegaconf import OmegaConf

        from ldm.util import load_yaml

        training, logger = self.training, "lightning.callbacks.image_logger"
        values = {
            f"{logger}.target": "main_dream_booth.ImageLogger",
            f"{logger}.params.batch_frequency": training.every,
            f"{logger}.params.max_images": SAMPLES,
            f"{logger}.params.increase_log_steps": "false",
            f"{logger}.params.log_first_step": "true",
            f"{logger}.params.log_images_kwargs.steps": SAMPLE_STEPS,
            f"{logger}.params.log_images_kwargs.own_captions": "false",
            "lightning.trainer.logger": "false",
            "lightning.modelcheckpoint.params.save_top_k": 0,  # the result is what was trained, not the whole model
            "lightning.modelcheckpoint.params.save_last": "false",
        }
        if training.rate:
            values["model.base_learning_rate"] = training.rate
        schedule = OmegaConf.select(load_yaml(training.way.base), "model.params.scheduler_config.params") or {}
        if "max_decay_steps" in schedule:
            values["model.params.scheduler_config.params.max_decay_steps"] = training.steps
            rise = min(schedule.get("warm_up_steps", 0), training.steps // 4)
            values["model.params.scheduler_config.params.warm_up_steps"] = rise
        return [f"{key}={value}" for key, value in values.items()]

    def watch(self, process: subprocess.Popen, job: Job) -> None:
        """Tell how far it is until it ends."""
        began: tuple[float, int] | None = None
        while process.poll() is None:
            time.sleep(0.25)
            job.heed(picture_done=True)
            if self.look(job):
                step, loss = job.losses[-1]
                began = began or (time.monotonic(), step)
                line = f"step {step} of {self.training.steps}, loss {loss:.4f}"
                if step > began[1]:
                    left = (time.monotonic() - began[0]) / (step - began[1]) * (self.training.steps - step)
                    line += f", {said(left)} left"
                job.say(line, step / self.training.steps)
        self.look(job)

    def look(self, job: Job) -> bool:
        """Take up losses and samples; whether there are new losses."""
        last = job.samples[-1][0] if job.samples else 0
        new = [(step, read_preview(path)) for step, path in samples_in(self.folder) if step > last]
        if new:
            kept = [*job.samples, *new]
            job.samples = kept if len(kept) <= ROWS else [kept[0], *kept[1 - ROWS :]]
            job.changed()
        losses = read_losses(self.folder / learner.PROGRESS)
        grown = len(losses) > len(job.losses)
        job.losses = losses
        return grown

    def stop(self, process: subprocess.Popen, job: Job) -> None:
        """Have it end with its present step; where it has made none, there is nothing to keep."""
        if job.losses:
            job.say("saving what it has learnt")
            (self.folder / learner.STOP).touch()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                return

    def keep(self, job: Job) -> str:
        """Put the result on the shelf; returns what is said of it.

        Raises:
            UserError: there is none.
        """
        try:
            result = json.loads((self.folder / learner.RESULT).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"training: {reason_in(self.folder / 'output.log', None)}") from error
        steps, best, way = result["steps"], result["best_step"], self.training.way.title
        name = f"{self.folder.name} {way}, {best or steps} steps"
        about = {"prompt": self.prompt, "way": way, "class_word": self.training.class_word, "steps": best or steps}
        self.studio.shelf.keep(name, result["files"], about)
        job.results.append(name)
        job.changed()
        return f"step {best} of {steps} was the best and is kept" if best else f"step {steps} is kept"


def _new_folder(studio: Studio, class_word: str) -> Path:
    """A folder for a training, whose name none of those before it has."""
    word = re.sub(r"[^a-z0-9]+", "-", class_word.lower()).strip("-") or "subject"
    parent = studio.folder / "trainings"
    parent.mkdir(parents=True, exist_ok=True)
    shelved = {name.split(" ")[0] for name in studio.shelf.all()}
    number = 1
    while True:
        folder = parent / f"{word}-{number}"
        try:
            if folder.name not in shelved:
                folder.mkdir()
                return folder
        except FileExistsError:  # an earlier one's, or one's that somebody starts at this moment
            pass
        number += 1


def write_photos(training: Training, folder: Path) -> None:
    """The photos as PNG, and their captions beside them."""
    folder.mkdir()
    for i, photo in enumerate(training.photos):
        path = folder / f"{i:03}.png"
        photo.save(path)
        if training.captions:
            caption_path(path).write_text(training.captions[i] + "\n", encoding="utf-8")


def draw_priors(studio: Studio, training: Training, folder: Path, job: Job) -> None:
    """Images of the class by the model as it is, see `ldm.prior_images`."""
    from ldm import generation, hub, prior_images

    def look(_: Any) -> None:
        job.heed(picture_done=True)
        drawn = len(list(folder.glob("prior-*.png")))
        job.say(f"drawing prior images, {drawn} of {training.prior}", drawn / training.prior)

    studio.wear({})
    made_by = {"ckpt": generation.fingerprint(hub.find_checkpoint(studio.options.ckpt))}
    drawing = prior_images.Drawing(seed=training.seed)
    prompts = prior_prompts(studio, training)
    prior_images.make(lambda: studio.model, folder, prompts, training.prior, made_by, drawing, look)


def prior_prompts(studio: Studio, training: Training) -> list[str]:
    """The class's caption; for the tiny model, whose world is small, also its other scenes."""
    if is_tiny(studio):
        from ldm.evaluation import personalization

        return personalization.prior_prompts(training.class_word, training.prior)
    return [CLASS_CAPTION.format(training.class_word)] * training.prior


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) from the lines that a `learner` writes; the last may not be whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return [tuple(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def samples_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the pictures of the subject that a run has drawn."""
    found = folder.glob("logs/*/images/train/prompts_samples_gs-*.png")
    return sorted((int(re.findall(r"_gs-(\d+)", path.name)[0]), path) for path in found)


def read_preview(path: Path) -> bytes:
    """A picture for the page."""
    from PIL import Image

    with Image.open(path) as image:
        return as_jpeg(image)


def reason_in(log: Path, code: int | None) -> str:
    """What a run said of its end."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    where = "/".join(log.parts[-3:])
    return errors[-1] if errors else f"it ended without a result (exit code {code}); {where} says more"
