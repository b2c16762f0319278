"""Prior images of the class (Ruiz et al., 2023, section 3.2), drawn by the base model before a training, where few are.

They lie flat in the folder of prior images, beside those that people put there: `prior-00012.png`, its caption beside
it. Picture i has the seed `seed` + i and is the same to the bit however often drawing was stopped.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm import generation
from ldm.data.base import SUFFIXES
from ldm.data.captions import caption_path
from ldm.data.personalized_dream import CLASS_CAPTION
from ldm.errors import UserError
from ldm.util import atomic_path

ENOUGH = 200  # where nobody put images there or says a number
WAIT = 1.0  # seconds between two looks at what other processes have drawn
OWN = re.compile(r"prior-(\d{5,})\.png")


@dataclass(frozen=True)
class PriorPlan(generation.Plan):
    """The pictures that a folder of prior images lacks."""

    flag: str = "--reg_data_root"

    def name(self, i: int) -> str:
        return f"prior-{i:05}.png"

    def present(self) -> list[int]:
        return sorted(int(match[1]) for file in self.folder.glob("prior-*.png") if (match := OWN.fullmatch(file.name)))

    def missing(self) -> int:
        """How many pictures are to be drawn."""
        return self.count - sum(i < self.count for i in self.present())

    def check(self, settings: dict[str, Any]) -> None:
        """Compare the settings with those of pictures that are all there: another seed's are as good.

        Raises:
            UserError: the pictures were made otherwise. Where no settings are kept, people put them there.
        """
        if (before := self.kept()) is not None:
            replace(self, seed=before.get("seed", self.seed)).agree(settings)

    def write_manifest(self) -> None:
        """Write the captions beside the pictures."""
        for i in self.present():
            path = caption_path(self.folder / self.name(i))
            if not path.is_file():
                with atomic_path(path) as temporary:
                    temporary.write_text(f"{self.prompt(i)}\n", encoding="utf-8")


@dataclass(frozen=True)
class Drawing:
    """How prior images are drawn: by DPM-Solver++, without guidance unless told otherwise.

    The model's own samples are what its loss fits already, and hold it where it is; guided ones would be learned.
    """

    steps: int = 25
    scale: float = 1.0
    seed: int = 0
    batch_size: int = 8


def own_images(folder: Path) -> int:
    """How many images of a folder were not drawn by `make`."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sum(file.suffix.lower() in SUFFIXES and not OWN.fullmatch(file.name) for file in files)


def lacking(folder: Path, wanted: int | None) -> int:
    """How many pictures `make` is to have drawn so that there are `wanted`; None: `ENOUGH` where nobody put any."""
    own = own_images(folder)
    if wanted is None:
        wanted = 0 if own else ENOUGH
    return max(0, wanted - own)


def make(
    model_of: Callable[[], Any],
    folder: str | Path,
    prompts: Sequence[str],
    count: int,
    made_by: dict[str, Any],
    drawing: Drawing | None = None,
    callback: Callable[[Any], Any] | None = None,
) -> int:
    """Draw what is lacking of `count` prior images into `folder`; returns how many were drawn.

    Args:
        model_of: makes the base model, and is called only where something is to be drawn.
        prompts: picture i shows prompts[i % len(prompts)].
        made_by: what else the pictures depend on, such as the checkpoint; other pictures there are refused.
        callback: of `ldm.inference.txt2img`; what it raises ends the drawing, and another call goes on with it.

    Raises:
        UserError: the folder's pictures were made otherwise, or cannot be written.
    """
    from ldm.inference import Protection, txt2img

    drawing = drawing or Drawing()
    plan = PriorPlan(Path(folder), list(prompts), drawing.seed, count)
    missing, settings = plan.missing(), {**made_by, "steps": drawing.steps, "scale": drawing.scale}
    if missing <= 0:
        plan.check(settings)
        return 0
    place = generation.Place.here() or generation.Place()
    plan.agree(settings)
    if place.world == 1:
        plan.clean()
    if place.rank == 0:
        print(f"{missing} of {count} prior images are drawn by the model as it is: {folder}")
    model = model_of()

    def draw(texts: list[str], seeds: list[int]) -> Any:
        return txt2img(
            model, texts, seeds=seeds, sampler="dpm_solver", steps=drawing.steps, scale=drawing.scale, exact=True,
            protection=Protection(), progress=False, callback=callback,
        )  # fmt: skip

    generation.draw_share(plan, place, draw, drawing.batch_size, exact=True, shown=place.rank == 0)
    while len(plan.present()) < count:  # other processes are not done
        time.sleep(WAIT)
    return missing


def base_config(config: Any) -> Any:
    """The yaml of a run's base model: without what the run would put into it."""
    config = config.copy()
    params = config.model.params
    params.train_level, params.use_ema = ["unet"], False
    unet = params.unet_config
    if "adapter_config" in unet.params:
        del unet.params.adapter_config
        unet.target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return config


def for_run(run: Any) -> None:
    """Make the prior images that a DreamBooth run lacks, as its flags ask.

    Raises:
        UserError: no base model is named, or see `make`.
    """
    from ldm.loading import load_model

    options: argparse.Namespace = run.options
    reg = run.config.data.params.get("reg")
    folder = reg and reg.params.get("data_root")
    if not folder or not run.config.model.params.get("reg_weight", 1.0) or not options.train:
        return
    count = lacking(Path(folder), options.num_reg_images)
    resumed = run.resume_from is not None  # its pictures were checked when it began
    if not count or (resumed and not PriorPlan(Path(folder), [], options.seed, count).missing()):
        return
    base = options.actual_resume
    if not base:
        raise UserError("--reg_data_root: prior images are lacking; name the model that draws them: --actual_resume")
    prompts = [CLASS_CAPTION.format(reg.params.get("placeholder_token", "dog"))]
    if options.reg_prompts:
        prompts = generation.read_prompts(options.reg_prompts)
    config = base_config(run.config)
    drawing = Drawing(options.reg_steps, options.reg_scale, options.seed)
    make(lambda: load_model(config, base), folder, prompts, count, {"ckpt": generation.fingerprint(base)}, drawing)
