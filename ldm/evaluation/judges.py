"""Who says how alike a subject's photos the pictures are, and how far other prompts have drifted.

In the tiny world its own features and its reader do; elsewhere a vision network does, CLIP's (CLIP-I) or DINO, as in
DreamBooth (Ruiz et al., 2023, section 4.1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import cycle, islice

import torch
from PIL import Image

from ldm.data.personalized_dream import SUBJECT, caption_of
from ldm.evaluation import features
from ldm.util import UserError

TINY_WORLD = "tiny-world"
PLACES = ("", " on a beach", " in the snow", " on a wooden table", " in a forest", " in front of a brick wall",
          " in a street at night", " on a green lawn")  # fmt: skip
OTHERS = (
    "a red car parked in a street", "a bowl of fruit on a table", "a mountain lake in the morning", "an old man",
    "a lighthouse in a storm", "a wooden chair by a window", "a crowded market", "a watercolour of a village",
    "a black cat on a roof", "a child with a balloon", "a plate of pasta", "a train crossing a bridge",
)  # fmt: skip

Images = Sequence[Image.Image]


class Judge(ABC):
    """Numbers of a tuned model's pictures.

    Attributes:
        most_drift: how much drift is little. unit: what drift is, in words.
    """

    most_drift: float
    unit: str

    @abstractmethod
    def similarity(self, images: Images, photos: Images) -> float:
        """The mean cosine, at most 1, between every picture's features and every photo's."""

    @abstractmethod
    def drift(self, before: Images, after: Images, prompts: Sequence[str]) -> float:
        """What changed in pictures of other prompts, from the same seeds: 0 is nothing."""

    @abstractmethod
    def subject_prompts(self, class_word: str, count: int, subject: str = SUBJECT) -> list[str]:
        """Prompts that name the subject."""

    @abstractmethod
    def other_prompts(self, count: int) -> list[str]:
        """Prompts that have nothing to do with it."""


class TinyWorld(Judge):
    """The tiny world's features, and the share of other prompts that are drawn right no more."""

    most_drift, unit = 0.05, "share of other prompts drawn wrong since"

    def similarity(self, images: Images, photos: Images) -> float:
        return features.subject_similarity(images, photos)

    def drift(self, before: Images, after: Images, prompts: Sequence[str]) -> float:
        numbers = features.drift(before, after, prompts)
        return numbers["accuracy_before"] - numbers["accuracy_after"]

    def subject_prompts(self, class_word: str, count: int, subject: str = SUBJECT) -> list[str]:
        from ldm.evaluation.personalization import subject_prompts

        return subject_prompts(class_word, count, subject)

    def other_prompts(self, count: int) -> list[str]:
        from ldm.evaluation.personalization import other_prompts

        return other_prompts(count)


class VisionNetwork(Judge):
    """A vision network's features: CLIP's image embedding, or the class token of DINO and other transformers.

    Args:
        name: a folder in transformers' form, or a name on the model hub. device: where it runs.

    Raises:
        UserError: there is no such network.
    """

    most_drift, unit = 0.1, "1 - cosine to what other prompts gave before"

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

        try:
            self.is_clip = AutoConfig.from_pretrained(name).model_type.startswith("clip")
            kind = CLIPVisionModelWithProjection if self.is_clip else AutoModel
            self.model = kind.from_pretrained(name).to(device).eval().requires_grad_(False)
            self.processor = AutoImageProcessor.from_pretrained(name)
        except Exception as error:  # the hub's client raises many types
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"features: '{name}' is neither {TINY_WORLD} nor CLIP or DINO: {reason}") from error

    @torch.inference_mode()
    def features(self, images: Images) -> torch.Tensor:
        """Features [B, D] of length 1."""
        device = next(self.model.parameters()).device
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values.to(device)
        found = self.model(pixel_values=pixels)
        return torch.nn.functional.normalize(found.image_embeds if self.is_clip else found.last_hidden_state[:, 0])

    def similarity(self, images: Images, photos: Images) -> float:
        return float((self.features(images) @ self.features(photos).T).mean())

    def drift(self, before: Images, after: Images, prompts: Sequence[str]) -> float:
        return float(1 - (self.features(before) * self.features(after)).sum(1).mean())

    def subject_prompts(self, class_word: str, count: int, subject: str = SUBJECT) -> list[str]:
        return list(islice(cycle(caption_of(class_word, subject) + place for place in PLACES), count))

    def other_prompts(self, count: int) -> list[str]:
        return list(islice(cycle(OTHERS), count))


def judge_of(name: str, device: torch.device | str = "cpu") -> Judge:
    """`tiny-world`, or a folder or hub name of a vision network."""
    return TinyWorld() if name == TINY_WORLD else VisionNetwork(name, device)
