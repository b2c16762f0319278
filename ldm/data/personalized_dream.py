"""DreamBooth's data: photos of one subject, or of its class, with the captions that name them.

The parameters are those of the adapter paper's data set (Xiang et al. 2023; Ruiz et al. 2023, DreamBooth).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from PIL import ImageEnhance

from ldm.data.base import CROPS, ImageFolder, fit, image_size, open_image, to_array
from ldm.data.buckets import Buckets
from ldm.data.captions import read_caption
from ldm.errors import UserError

COLOUR_CHANGES = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
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
        flip_p: probability of mirroring; which items are mirrored is a function of (`seed`, item).
        set: "train" or another name.
        placeholder_token: the class word, e.g. "dog".
        per_image_tokens, mixing_prob: of textual inversion; `per_image_tokens` is not available here.
        center_crop: False squashes a photo into the square instead of cropping it.
        crop: what is kept of a photo's longer side, in place of center_crop: `center`, `random` (any part) or `squash`.
        colour: how much brightness, contrast and saturation vary, from 0 (not) to below 1.
        versions: how many crops and colours a photo has, which training takes by chance; None is 8 where they vary.
        buckets: keep about each photo's own aspect, see `ldm.data.buckets.Buckets.of`; training then draws batches of
            one size each.
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
        crop: str | None = None,
        colour: float = 0.0,
        versions: int | None = None,
        buckets: bool | Mapping[str, int] = False,
    ) -> None:
        if per_image_tokens:
            raise UserError("yaml: per_image_tokens belongs to textual inversion, which is not yet here; set it false")
        if not 0 <= flip_p <= 1:
            raise UserError(f"yaml: flip_p is {flip_p}; it must lie between 0 and 1")
        if not isinstance(repeats, int) or repeats < 1:
            raise UserError(f"yaml: repeats is {repeats!r}; it must be a whole number of at least 1")
        self.crop = crop or ("center" if center_crop else "squash")
        if self.crop not in CROPS:
            raise UserError(f"yaml: crop is {crop!r}; it must be one of {', '.join(CROPS)}")
        if not 0 <= colour < 1:
            raise UserError(f"yaml: colour is {colour!r}; it must be at least 0 and below 1")
        self.colour, varied = colour, self.crop == "random" or colour > 0
        self.versions = (versions or 8) if varied and set == "train" else 1
        self.photos = ImageFolder(data_root, size, interpolation, center_crop)
        self.buckets = Buckets.of(buckets, size)
        self.bucket = None
        if self.buckets is not None:
            self.bucket = self.buckets.nearest(np.array([image_size(path) for path in self.photos.paths]))
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

    @property
    def bucket_of(self) -> np.ndarray | None:
        """The bucket of every item; None without buckets."""
        return None if self.bucket is None else np.tile(self.bucket, self.repeats)

    def size_of(self, index: int) -> tuple[int, int] | None:
        """(width, height) of photo `index` where that is not simply a square."""
        return None if self.bucket is None else self.buckets.sizes[self.bucket[index]]

    def image(
        self, index: int, flip: bool = False, version: int = 0, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Photo `index`, mirrored if `flip`: float32 [H, W, 3] in [-1, 1].

        Args:
            version: which of its crops and colours. size: (width, height) in place of its own.
        """
        photo = open_image(self.photos.paths[index])
        side = self.photos.size or min(photo.size)
        place, *factors = np.random.default_rng([self.seed, int(self.reg), index, version]).uniform(size=4)
        place = place if self.crop == "random" else 0.5
        size = size or self.size_of(index) or (side, side)
        photo = fit(photo, size, self.photos.interpolation, self.crop != "squash", place)
        if self.colour:
            for change, factor in zip(COLOUR_CHANGES, factors, strict=True):
                photo = change(photo).enhance(1 + self.colour * (2 * factor - 1))
        image = to_array(photo)
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

    def version(self, item: int) -> int:
        """Which crop and colours item `item` shows."""
        return int(np.random.default_rng([self.seed, int(self.reg), item, 1]).integers(self.versions))

    def __getitem__(self, item: int) -> dict:
        index, flip = self.choose(item)
        return {
            "image": self.image(index, flip, self.version(item)),
            "caption": self.caption(index),
            "index": index,
            "flip": flip,
        }
