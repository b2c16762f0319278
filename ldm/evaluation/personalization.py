"""What tuning on a few photos of a subject did to a model: the same prompts and seeds before and after, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from PIL import Image
from torch import nn

from ldm.data.captions import caption_path
from ldm.data.personalized_dream import CLASS_CAPTION, SUBJECT, caption_of
from ldm.data.shapes import BACKGROUNDS, PAIRS, SIZES
from ldm.errors import UserError
from ldm.evaluation.features import drift, subject_similarity
from ldm.evaluation.prompt_following import evaluation_scenes
from ldm.evaluation.shapes import read
from ldm.evaluation.sheet import Row, draw_sheet
from ldm.inference import txt2img
from ldm.modules.pictures import save_picture

Images = list[Image.Image]


@dataclass(frozen=True)
class Sampling:
    """How the compared pictures are drawn; the steps are DPM-Solver++'s."""

    steps: int = 20
    scale: float = 3.0
    batch_size: int = 32

    def draw(self, model: nn.Module, prompts: Sequence[str], seed: int) -> Images:
        """One picture a prompt; picture i has the seed `seed + i`."""
        pictures = txt2img(model, prompts, seed=seed, sampler="dpm_solver", exact=False, **asdict(self))
        return [picture.image for picture in pictures]


def subject_prompts(class_word: str, count: int, subject: str = SUBJECT) -> list[str]:
    """Prompts that name the subject: alone as in training, and on each background of the tiny world, in turn."""
    subject = caption_of(class_word, subject)
    prompts = [subject, *(f"{subject} on a {background} background" for background in BACKGROUNDS)]
    return [prompts[i % len(prompts)] for i in range(count)]


def _captions() -> list[str]:
    """All captions of the tiny world, in a random order that is always the same."""
    return [scene.caption for scene in evaluation_scenes(len(PAIRS) * len(SIZES) * len(BACKGROUNDS), "all", seed=1)]


def other_prompts(count: int) -> list[str]:
    """Prompts that have nothing to do with the subject: captions of any scene, the first of `_captions`, in turn."""
    return list(islice(cycle(_captions()), count))


def prior_prompts(class_word: str, count: int) -> list[str]:
    """What the untuned model draws as prior images.

    Of eight prompts two name the class and five are captions, taken from the end of `_captions`, so that those of
    `other_prompts` are not among them while both together are no more than there are, see `check_apart`. One is empty:
    guidance starts from what the model draws for no prompt, so that this must not drift either.
    """
    alone = CLASS_CAPTION.format(class_word)
    classes = cycle(f"{alone} on a {background} background" for background in BACKGROUNDS)
    captions = cycle(reversed(_captions()))
    return [next(classes) if i % 4 == 0 else "" if i % 8 == 5 else next(captions) for i in range(count)]


def check_apart(prior: Sequence[str], others: Sequence[str]) -> None:
    """Raise UserError where prior images, which are trained on, are of captions that measure what else changed."""
    known = set(_captions())
    shared = known & set(prior) & set(others)
    if shared:
        wanted = len(others) + sum(prompt in known for prompt in prior)
        raise UserError(
            f"--others {len(others)} and --prior_images {len(prior)} need {wanted} captions, but the tiny world has "
            f"{len(known)}: {len(shared)} would be trained on and measured; lower one of them"
        )


def write_prior_images(
    model: nn.Module, prompts: Sequence[str], folder: str | Path, seed: int, sampling: Sampling
) -> None:
    """Let the untuned model draw `prompts` into `folder`, the captions beside the pictures as .txt.

    It draws without guidance, whatever `sampling` says: its own samples are what its loss already fits, and change
    nothing; guided ones would be learned, and then guided once more. Prior images of an earlier call are removed.
    """
    for old in Path(folder).glob("[0-9]" * 5 + ".*"):
        old.unlink()
    images = replace(sampling, scale=1.0).draw(model, prompts, seed)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        path = Path(folder) / f"{i:05}.png"
        save_picture(image, path)
        caption_path(path).write_text(f"{prompt}\n", encoding="utf-8")


@dataclass(frozen=True)
class Pictures:
    """What one model draws for the subject's prompts and for others."""

    subject: Images
    others: Images

    @classmethod
    def of(
        cls, model: nn.Module, subject: Sequence[str], others: Sequence[str], seed: int, sampling: Sampling
    ) -> Pictures:
        """Draw them; the seeds of the two kinds do not overlap."""
        return cls(sampling.draw(model, subject, seed), sampling.draw(model, others, seed + len(subject)))


def background_share(images: Images, prompts: Sequence[str]) -> float:
    """Of the pictures whose prompts name a background, the share that has it."""
    wanted = [(image, prompt.split()[-2]) for image, prompt in zip(images, prompts, strict=True) if " on a " in prompt]
    return sum(read(image).background == background for image, background in wanted) / max(1, len(wanted))


def compare(
    photos: Images, before: Pictures, after: Pictures, subject: Sequence[str], others: Sequence[str]
) -> dict[str, float]:
    """Numbers of a tuned model beside its base.

    Args:
        photos: of the subject. before, after: by the base and the tuned model, for the same prompts and seeds.
        subject, others: the prompts.

    Returns:
        similarity_before, similarity_after: `ldm.evaluation.features.subject_similarity` to the photos;
        similarity_photos: that of the photos among themselves, which nothing can beat;
        background_after: share of the subject's pictures on the background that the prompt asks for;
        accuracy_before, accuracy_after, accuracy_change, pixel_change: `ldm.evaluation.features.drift` of the others.
    """
    return {
        "similarity_before": subject_similarity(before.subject, photos),
        "similarity_after": subject_similarity(after.subject, photos),
        "similarity_photos": subject_similarity(photos, photos),
        "background_after": background_share(after.subject, subject),
        **drift(before.others, after.others, others),
    }


def comparison_sheet(
    photos: Images,
    before: Pictures,
    after: Pictures,
    subject: Sequence[str],
    others: Sequence[str],
    title: str,
    notes: Sequence[str] = (),
    columns: int = 5,
) -> Image.Image:
    """Rows of photos, the subject's prompts before and after, other prompts before and after: `columns` of each."""

    def short(prompts: Sequence[str]) -> list[str]:
        return [prompt.removeprefix("a photo of ") for prompt in prompts]

    rows = [
        Row("what it learns from", f"{len(photos)} photos", photos[:columns], gap=True),
        Row("before", "the model as it was", before.subject[:columns]),
        Row("after", "tuned", after.subject[:columns], short(subject), gap=True),
        Row("before", "unrelated prompts", before.others[:columns]),
        Row("after", "should look the same", after.others[:columns], short(others)),
    ]
    return draw_sheet(rows, title, notes)
