"""Captioned images of collections that others prepared: Hugging Face data sets, and torchvision's MNIST and CIFAR."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import captions
from ldm.data.base import image_size, open_image, to_rgb
from ldm.data.captioned import CaptionedImages
from ldm.errors import UserError
from ldm.weight_files import one_line


def _file_of(value: Any) -> io.BytesIO | str | None:
    """The file, in memory or by its path, that a table's image may be."""
    if not isinstance(value, Mapping):
        return None
    return value.get("path") if value.get("bytes") is None else io.BytesIO(value["bytes"])


def as_image(value: Any, name: str) -> Image.Image:
    """A table's image in RGB: a PIL image, an array, or a mapping with the file's `bytes` or its `path`.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    if file := _file_of(value):
        return open_image(file, name if isinstance(file, io.BytesIO) else None)
    if isinstance(value, Image.Image | np.ndarray):
        return to_rgb(Image.fromarray(value) if isinstance(value, np.ndarray) else value)
    raise UserError(f"{name} has no image")


class Rows(CaptionedImages):
    """Captioned images of a table in memory or on disk: anything with a length whose items are mappings.

    Args:
        rows: the table.
        source: what errors call it.
        image_column: the column with the image: a picture, bytes, or a file's name.
        caption_column: the column with the caption or, with `class_names`, with the class's number; None means
            `caption`, or else `text`.
        class_names: the classes' names; items then hold `class_label` too.
        template: with `class_names`, the caption, {} being the class's name.
        keep: columns that items hold too.
        caption: the caption of images that have none; None counts them as broken.
        options: see `CaptionedImages`.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        source: str = "table",
        image_column: str = "image",
        caption_column: str | None = None,
        class_names: Sequence[str] | None = None,
        template: str = "a photo of a {}",
        keep: Sequence[str] = (),
        caption: str | None = None,
        **options: Any,
    ) -> None:
        captions.check_template(template)
        self.caption = caption
        self.rows, self.image_column, self.caption_column = rows, image_column, caption_column
        self.class_names, self.template, self.keep = class_names, template, tuple(keep)
        super().__init__(len(rows), source, **options)

    def read(self, index: int) -> dict[str, Any]:
        row, where = self.rows[index], f"{self.source}, row {index},"
        sample = captions.pick_fields(row, self.keep, where)
        if self.class_names is None:
            sample["caption"] = captions.pick_caption(row, self.caption_column, where, self.caption)
        else:
            label = row.get(self.caption_column)
            if label is None or not 0 <= int(label) < len(self.class_names):
                raise UserError(f"{where} has no class of {len(self.class_names)} ({self.caption_column}: {label})")
            sample["class_label"] = int(label)
            sample["caption"] = self.template.replace("{}", self.class_names[int(label)])
        return {**sample, "image": as_image(row.get(self.image_column), where)}

    def image_size(self, index: int) -> tuple[int, int]:
        file = _file_of(self.rows[index].get(self.image_column))
        return image_size(file, f"{self.source}, row {index},") if file else super().image_size(index)


class HuggingFaceImages(Rows):
    """A Hugging Face data set, from a folder that `save_to_disk` wrote or from the hub.

        target: ldm.data.tables.HuggingFaceImages
        params: {path: lambdalabs/naruto-blip-captions, size: 512, flip_p: 0.5}

    A caption column of class labels, as `caption_column: label`, makes captions of the classes' names.

    Args:
        path: the folder, or the data set's name on the hub.
        split: which part of it.
        name: which of its configurations, for one from the hub.
        revision: the hub's branch, tag or commit.
        image_column, caption_column: see `Rows`.
        options: see `Rows` and `CaptionedImages`.

    Raises:
        UserError: the package `datasets` is not installed, there is no such data set, or it lacks a column.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        caption_column: str | None = None,
        **options: Any,
    ) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(f"data set {path}: Hugging Face data sets need a package; pip install datasets") from None
        try:
            if Path(path).is_dir():
                rows = datasets.load_from_disk(path)
            else:
                rows = datasets.load_dataset(path, name, split=split, revision=revision)
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(f"data set {path} cannot be loaded: {one_line(error)}") from None
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise UserError(f"data set {path} has no split {split}; it has {', '.join(rows)}")
            rows = rows[split]
        self._check_columns(path, rows.features, image_column, caption_column, options.get("keep", ()))
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        if caption_column and isinstance(rows.features[caption_column], datasets.ClassLabel):
            options["class_names"] = rows.features[caption_column].names
        options |= dict(image_column=image_column, caption_column=caption_column)
        super().__init__(rows, f"data set {path}", **options)

    @staticmethod
    def _check_columns(path: str, known: Iterable[str], image: str, caption: str | None, keep: Sequence[str]) -> None:
        there = f"it has {', '.join(known)}"
        for column in (image, caption, *keep):
            if column is not None and column not in known:
                raise UserError(f"data set {path} has no column {column}; {there}")
        if caption is None and not set(captions.CAPTION_COLUMNS) & set(known):
            usual = " or ".join(captions.CAPTION_COLUMNS)
            raise UserError(f"data set {path} has no column {usual}; name one as caption_column: {there}")

    def files(self) -> Iterable[Path]:
        return [Path(file["filename"]) for file in self.rows.cache_files]


class _Labelled(Sequence):
    """A torchvision data set of (image, class number) as rows of a table."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.pairs[index]
        return {"image": image, "label": label}


class TorchvisionImages(Rows):
    """One of torchvision's small collections, from disk; the caption is made of the class's name.

        target: ldm.data.tables.TorchvisionImages
        params: {name: CIFAR10, data_root: data, size: 32, flip_p: 0.5}

    Args:
        name: MNIST, FashionMNIST, KMNIST, CIFAR10 or CIFAR100.
        data_root: where torchvision keeps it.
        train: its training part; False is its test part.
        template: the caption, {} being the class's name ("airplane", "seven").
        options: see `CaptionedImages`.

    Raises:
        UserError: there is no such collection, or not there.
    """

    COLLECTIONS = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100")

    def __init__(
        self, name: str, data_root: str, train: bool = True, template: str = "a photo of a {}", **options: Any
    ) -> None:
        if name not in self.COLLECTIONS:
            raise UserError(f"yaml: name is {name!r}; it must be one of {', '.join(self.COLLECTIONS)}")
        from torchvision import datasets

        try:
            pairs = getattr(datasets, name)(data_root, train=train, download=False)
        except (RuntimeError, OSError, ValueError, AssertionError, LookupError) as error:
            raise UserError(
                f"data: {name} is not in {data_root} or damaged ({one_line(error)}); fetch it with "
                f"python -c \"import torchvision; torchvision.datasets.{name}('{data_root}', download=True)\""
            ) from None
        names = [label.split(" - ")[-1] for label in pairs.classes]  # MNIST calls its classes "7 - seven"
        options |= dict(caption_column="label", class_names=names, template=template)
        self.folder = Path(pairs.raw_folder if hasattr(pairs, "raw_folder") else Path(data_root) / pairs.base_folder)
        super().__init__(_Labelled(pairs), f"{name} in {data_root}", **options)

    def files(self) -> Iterable[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())
