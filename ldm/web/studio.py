"""What the page's worker has at hand: the loaded model, the folder, the queue, the adapters; and drawing with them."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm import drawing, inference
from ldm.cli_checks import MAX_SEED, SD_CONFIG
from ldm.errors import UserError
from ldm.inpainting import KnownRegion
from ldm.loading import Geometry
from ldm.samplers import SAMPLERS, SCHEDULES, check_choice
from ldm.web import limits, ways
from ldm.web.adapters import Shelf
from ldm.web.gallery import Gallery, Request
from ldm.web.jobs import Job, Jobs

PREVIEW_SHARE = 0.15  # of the time of drawing may go into previews
LONGEST_SIDE = 768  # of a preview, in pixels
ADAPTER_WEIGHTS = -2.0, 2.0


class Studio:
    """All that lives as long as the page's program does.

    Args:
        options: the flags of scripts/webui.py. model, protection: of `cli_sampling.load`.
    """

    def __init__(self, options: argparse.Namespace, model: Any, protection: Any) -> None:
        self.options, self.model, self.protection = options, model, protection
        self.folder = Path(options.outdir).resolve()
        self.geometry = Geometry.of(model)
        default_size = 2 * max(self.geometry.height, self.geometry.width)
        self.limits = limits.Limits(
            max_size=options.max_size or default_size,
            max_pictures=options.max_pictures,
            max_steps=min(options.max_steps, model.num_timesteps),
            max_queue=options.max_queue,
            max_train_steps=options.max_train_steps,
            max_upload=options.max_upload,
            max_folder=options.max_folder,
        )
        self.gallery = Gallery(self.folder)
        self.shelf = Shelf(self.folder / "adapters", tuple(Path(path) for path in options.adapters or ()))
        self.jobs = Jobs(options.max_queue)

    @cached_property
    def config(self) -> Any:
        """The model's yaml."""
        from ldm import hub, identify
        from ldm.util import load_yaml

        if self.options.config != SD_CONFIG:
            return load_yaml(self.options.config)
        ckpt = hub.find_checkpoint(self.options.ckpt)
        return identify.config_of(ckpt, otherwise=SD_CONFIG, allow_pickle=self.options.allow_pickle)

    @cached_property
    def ways(self) -> dict[str, ways.Way]:
        """The ways to train that fit the model, by their titles."""
        return ways.offered(self.config, self.options.train_base)

    def wear(self, chosen: Mapping[str, float]) -> None:
        """Have the model wear the adapters of these names with these weights, and no others."""
        from ldm import artefacts

        worn = {name: weight for name, weight in chosen.items() if weight}
        artefacts.use(self.model, {path: weight for name, weight in worn.items() for path in self.shelf.find(name)})
        said = [f"{name} ({weight:g})" for name, weight in worn.items()]
        self.model.origin = {**getattr(self.model, "origin", {}), "adapter": ", ".join(said)}

    # ---- what the page asks for -------------------------------------------------------------------------------

    def request(self, kind: str, asked: Mapping[str, Any]) -> Request:
        """Check what a browser asked for; images are kept in the gallery's `inputs`.

        Args:
            asked: of the names of `Request`, but `size` for height and width, and as `image` and `mask` PIL images.

        Raises:
            UserError: something is wrong or too much; in one line for the person in front of the page.
        """
        self.limits.check_room(self.folder)
        self.jobs.check_room()
        most = self.limits
        sampler = limits.choice("Sampler", asked["sampler"], list(SAMPLERS))
        schedule = asked["schedule"] and limits.choice("Schedule", asked["schedule"], list(SCHEDULES))
        eta = None if asked["eta"] is None else limits.number("Eta", asked["eta"], 0, 1)
        if schedule == "uniform" or not SAMPLERS[sampler].scheduled:
            schedule = None
        check_choice(sampler, schedule, eta, {}, str.capitalize)
        count = limits.whole("Pictures", asked["count"], 1, most.max_pictures)
        request = Request(
            kind,
            prompt=limits.text("Prompt", asked["prompt"]),
            negative_prompt=limits.text("Negative prompt", asked["negative_prompt"]),
            sampler=sampler,
            schedule=schedule,
            steps=limits.whole("Steps", asked["steps"], 1, most.max_steps),
            scale=limits.number("Guidance", asked["scale"], 0, 50),
            eta=eta,
            seed=limits.whole("Seed", asked["seed"], 0, MAX_SEED - count + 1),
            count=count,
            prompt_weighting=asked["prompt_weighting"] is True,
            clip_skip=limits.whole("Clip skip", asked["clip_skip"], 1, 12) if asked["clip_skip"] else None,
            adapters=self._adapters(asked["adapters"]),
        )
        if kind == "text":
            height, width = (
                limits.whole(name.capitalize(), asked[name], 8, most.max_size) for name in ("height", "width")
            )
            self.geometry.check(height, width)
            return replace(request, height=height, width=width)
        side = limits.whole("Longer side", asked["side"], self.geometry.multiple, most.max_size)
        image = limits.fitted(asked["image"], side)
        mask = None
        if kind == "inpaint":
            from PIL import Image

            mask = asked["mask"].resize(image.size, Image.Resampling.NEAREST)
            KnownRegion.of(image, mask)
        return replace(
            request,
            side=side,
            strength=limits.number("Strength", asked["strength"], 0.01, 1),
            image=self.gallery.keep_input(image),
            mask=mask and self.gallery.keep_input(mask),
        )

    def _adapters(self, slots: Any) -> dict[str, float]:
        known = list(self.shelf.all())
        chosen: dict[str, float] = {}
        for name, weight in slots:
            if not name:
                continue
            name = limits.choice("Adapter", name, known)
            if name in chosen:
                raise UserError(f"adapter '{name}': it is chosen twice; set one of them to none")
            chosen[name] = limits.number(f"Weight of '{name}'", weight, *ADAPTER_WEIGHTS)
        return chosen

    def draw(self, request: Request) -> int:
        """Put pictures into the queue; returns how many jobs are before them."""
        short = request.prompt if len(request.prompt) < 60 else request.prompt[:57] + "..."
        return self.jobs.submit(Job(short or "(no prompt)", lambda job: self._draw(request, job)))

    # ---- what the worker does ---------------------------------------------------------------------------------

    def _draw(self, request: Request, job: Job) -> None:
        """Picture by picture, each on disk before the next one begins."""
        job.say("preparing", 0.0)
        self.wear(request.adapters)
        images = self._images(request)
        draw = {"text": inference.txt2img, "image": inference.img2img, "inpaint": inference.inpaint}[request.kind]
        look = Look(job, request.count)
        for i in range(request.count):
            if i:
                job.heed(picture_done=True)
            one = replace(request, seed=request.seed + i, count=1)
            look.place = i
            (picture,) = draw(self.model, *images, one.prompt, **self._settings(one), callback=look, progress=False)
            job.results.append(self.gallery.add(picture, one))
            if picture.blocked:
                raise UserError(f"the safety checker blocked the picture of seed {one.seed}; it is black")
            job.changed()

    def _images(self, request: Request) -> list[Any]:
        from PIL import Image

        paths = [self.gallery.input(name) for name in (request.image, request.mask) if name]
        return [Image.open(path) for path in paths]

    def _settings(self, request: Request) -> dict[str, Any]:
        same = ("sampler", "schedule", "steps", "scale", "eta", "seed", "negative_prompt", "prompt_weighting")
        settings = {name: getattr(request, name) for name in (*same, "clip_skip")}
        if request.kind == "text":
            settings |= {"height": request.height, "width": request.width}
        else:
            settings["strength"] = request.strength
        flags = ("precision", "vae_tiling", "attention_slicing")
        return settings | {"protection": self.protection} | {name: getattr(self.options, name) for name in flags}


@dataclass
class Look:
    """A sampler's callback: how far a job is, a preview now and then, and the place where it can be stopped."""

    job: Job
    count: int
    place: int = 0
    began: float = 0.0
    next_preview: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, preview: drawing.Preview) -> None:
        self.job.heed()
        now = time.monotonic()
        if now >= self.next_preview and preview.step < preview.steps:
            self.job.preview = as_jpeg(preview.images()[0])
            spent = time.monotonic() - now
            self.next_preview = now + max(0.3, spent / PREVIEW_SHARE)
        done = (self.place + preview.step / preview.steps) / self.count
        left = (time.monotonic() - self.began) * (1 / done - 1)
        which = f"picture {self.place + 1} of {self.count}, " if self.count > 1 else ""
        self.job.say(f"{which}step {preview.step} of {preview.steps}, {said(left)} left", done)


def said(seconds: float) -> str:
    """A duration in words."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def as_jpeg(image: Any) -> bytes:
    """A picture for a preview."""
    from PIL import Image

    image = image.copy()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BILINEAR)
    written = io.BytesIO()
    image.convert("RGB").save(written, "JPEG", quality=85)
    return written.getvalue()
