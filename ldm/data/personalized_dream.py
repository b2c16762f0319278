"""DreamBooth's data: photos of one subject, or of its class, with the captions that name them.

The parameters are those of the adapter paper's data set (Xiang et al. 2023; Ruiz et al. 2023, DreamBooth).
"""

from __future__ import annotations

import re

import numpy as np

from ldm.data.base import ImageFolder
from ldm.data.captions import read_caption
from ldm.errors import UserError

SUBJECT = "sks"  # what the subject is called in captions, unless it gets a word of its own
CLASS_CAPTION = "a photo of a {}"
INSTANCE_CAPTION = f"a photo of a {SUBJECT} {{}}"


def caption_of(class_word: str, subject: str = SUBJECT) -> str:
    """The caption of a photo of the subject."""
    return CLASS_CAPTION.format(f"{subject} {class_word}")


class PersonalizedBase:
    """Captioned photos; items are dict(image, caption, index, flip).

    `image` is float32 [size, size, 3] in [-1, 1], `index` the photo's number and `flip` whether the image is
    mirrored: with `image(index, flip)` a trainer can prepare both versions of every photo once.

    A photo's caption is the text of the `.txt` file of its name beside it, where there is one, else the template
    with the class word. In both the subject is called `subject`: a `sks` in a text file stands for it.

    Args:
        data_root: folder with photos; unreadable files are reported and left out.
        size: pixels a side; None keeps each photo's shorter side.
        repeats: how often a training set goes through its photos; other sets do so once.
        interpolation: linear, bilinear, bicubic or lanczos.
        flip_p: probability of mirroring; which items are mirrored is a function of (seed, item).
        set: "train" or another name.
        placeholder_token: the class word, e.g. "dog".
        per_image_tokens, mixing_prob: of textual inversion; `per_image_tokens` is not available here.
        center_crop: False squashes a photo into the square instead of cropping it.
        coarse_class_text: words before the class word.
        reg: whether these are images of the class (caption without the subject's name).
        subject: what the subject is called, e.g. the new word of textual inversion.

    Raises:
        UserError: the folder holds no readable image, or a parameter is out of its range.
    """

    def __init__(
        self,
        data_root: str,
        size: int | None = None,
        repeats: int = 100,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",
        placeholder_token: str = "dog",
        per_image_tokens: bool = False,
        center_crop: bool = True,
        mixing_prob: float = 0.25,
        coarse_class_text: str | None = None,
        reg: bool = False,
        seed: int = 0,
        subject: str = SUBJECT,
    ) -> None:
        if per_image_tokens:
            raise UserError("yaml: per_image_tokens belongs to textual inversion, which is not yet here; set it false")
        if not 0 <= flip_p <= 1:
            raise UserError(f"yaml: flip_p is {flip_p}; it must lie between 0 and 1")
        if not isinstance(repeats, int) or repeats < 1:
            raise UserError(f"yaml: repeats is {repeats!r}; it must be a whole number of at least 1")
        self.photos = ImageFolder(data_root, size, interpolation, center_crop)
        self.flip_p, self.reg, self.seed = flip_p, reg, seed
        self.repeats = repeats if set == "train" else 1
        class_text = f"{coarse_class_text} {placeholder_token}" if coarse_class_text else placeholder_token
        self.template_caption = CLASS_CAPTION.format(class_text) if reg else caption_of(class_text, subject)
        captions = [read_caption(path) for path in self.photos.paths]
        self.captions = [text and re.sub(rf"\b{SUBJECT}\b", lambda _: subject, text) for text in captions]

    @property
    def num_images(self) -> int:
        """How many photos there are, repeats apart."""
        return len(self.photos)

    def __len__(self) -> int:
        return self.num_images * self.repeats

    def image(self, index: int, flip: bool = False) -> np.ndarray:
        """Photo `index`, mirrored if `flip`: float32 [H, W, 3] in [-1, 1]."""
        image = self.photos[index]
        return np.ascontiguousarray(image[:, ::-1]) if flip else image

    def caption(self, index: int) -> str:
        """The caption of photo `index`."""
        caption = self.captions[index]
        return self.template_caption if caption is None else caption

    def choose(self, item: int) -> tuple[int, bool]:
        """Which photo item `item` shows, and whether mirrored."""
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        flip = np.random.default_rng([self.seed, int(self.reg), item]).random() < self.flip_p
        return item % self.num_images, bool(flip)

    def __getitem__(self, item: int) -> dict:
        index, flip = self.choose(item)
        return {
            "image": self.image(index, flip),
            "caption": self.caption(index),
            "index": index,
            "flip": flip,
        }
