"""Captioned images from folders: with captions beside them, in a table, or as the names of their classes."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data import captions
from ldm.data.base import Framing, image_size, list_images, open_image
from ldm.data.buckets import Buckets
from ldm.errors import UserError


class CaptionedImages(Dataset, ABC):
    """What all sets of captioned images share; a kind of set says in `read` where a sample comes from.

    Items are dict(image=float32 [H, W, 3] in [-1, 1], caption=str, index=int) and what the set adds. `data[index]`
    is the sample as the first epoch shows it, `data[epoch, index]` as a later one does.

    The place of a sample that cannot be read is taken by the next one (of its size) that can. Broken samples are
    counted over all loader processes and told in one line when they are 1, 2, 4, 8, ...

    Args:
        length: how many samples there are.
        source: what errors call the set.
        max_broken: the share of samples, rounded up to a whole number, that may be broken; more end the run.
        buckets: pictures keep about their own aspect, and batches are of one size: true, or the parameters of
            `ldm.data.buckets.Buckets`, such as `{step: 64}`. `size`² is then the most pixels of a picture. Every
            image's header is read at the start, except where a table or .json tells `width` and `height`.
        framing: the parameters of `ldm.data.base.Framing`: size, interpolation, crop, flip_p, seed.

    Raises:
        UserError: the set is empty, or a parameter is out of its range.
    """

    by_epoch = True  # the data module's sampler asks for (epoch, index)
    bucket_of: np.ndarray | None = None  # the number of each sample's bucket, -1 for broken ones

    def __init__(
        self,
        length: int,
        source: str,
        max_broken: float = 0.01,
        buckets: bool | Mapping[str, int] = False,
        **framing: Any,
    ) -> None:
        if not isinstance(max_broken, int | float) or not 0 <= max_broken <= 1:
            raise UserError(f"yaml: max_broken is {max_broken!r}; it must be a share between 0 and 1")
        if length == 0:
            raise UserError(f"{source} holds no samples")
        self.source, self.framing = source, Framing(**framing)
        self.allowed = math.ceil(max_broken * length)
        self._broken = torch.zeros(length, dtype=torch.uint8).share_memory_()
        self.buckets = Buckets.of(buckets, self.framing.size)
        if self.buckets is not None:
            self.bucket_of = self._sort(self.buckets)

    @abstractmethod
    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` with its `image` as a PIL image in RGB; UserError if it is broken."""

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) of a sample's image, or at least their ratio; UserError if it is broken."""
        return self.read(index)["image"].size

    def files(self) -> Iterable[Path]:
        """The files that the set is made of, to see whether it changed."""
        return ()

    def __len__(self) -> int:
        return len(self._broken)

    @property
    def broken(self) -> int:
        """How many samples were found broken so far, by any loader process."""
        return int(self._broken.sum())

    def _skip(self, index: int, error: UserError) -> None:
        self._broken[index] = 1
        count = self.broken
        told = f"{self.source}: {count} of {len(self)} samples are broken (at most {self.allowed} may be)"
        if count > self.allowed:
            raise UserError(f"{told}; mend them or raise max_broken; the last: {error}")
        if count.bit_count() == 1:
            print(f"skipped: {told}; the last: {error}", file=sys.stderr)

    def _sort(self, buckets: Buckets) -> np.ndarray:
        sizes = np.ones((len(self), 2))
        for index in tqdm(range(len(self)), desc=f"Measuring the images of {self.source}", disable=len(self) < 10_000):
            try:
                sizes[index] = self.image_size(index)
            except UserError as error:
                self._skip(index, error)
        return np.where(self._broken.numpy(), -1, buckets.nearest(sizes))

    def _find(self, index: int) -> tuple[int, dict[str, Any]]:
        """The number and contents of sample `index`, or of the one that takes its place."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        for candidate in chain(range(index, len(self)), range(index)):
            alike = self.bucket_of is None or self.bucket_of[candidate] == self.bucket_of[index]
            if self._broken[candidate] or not alike:
                continue
            try:
                return candidate, self.read(candidate)
            except UserError as error:
                self._skip(candidate, error)
        size = "" if self.bucket_of is None else " of one size"
        raise UserError(f"{self.source}: none of its {len(self)} samples{size} can be read")

    def _show(self, number: int, image: Image.Image, epoch: int, flip: bool | None = None) -> np.ndarray:
        size = None if self.bucket_of is None else self.buckets.sizes[self.bucket_of[number]]
        return self.framing(image, epoch, number, size, flip)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        number, sample = self._find(index)
        return {**sample, "image": self._show(number, sample["image"], epoch), "index": number}

    def versions(self, index: int) -> dict[str, Any]:
        """Sample `index` as the first epoch crops it, with `image` [V, H, W, 3]: as it is and, if flip_p, mirrored."""
        number, sample = self._find(index)
        flips = (False, True) if self.framing.flip_p else (False,)
        images = np.stack([self._show(number, sample["image"], 0, flip) for flip in flips])
        return {**sample, "image": images, "index": number}


class CaptionedFolder(CaptionedImages):
    """Images of a folder and its subfolders, captioned by a text file beside each or by a table.

        target: ldm.data.captioned.CaptionedFolder
        params: {data_root: photos, size: 512, crop: random, flip_p: 0.5}

    `cat.jpg` is captioned by `cat.txt`; an empty file is an empty caption. A table, `metadata.jsonl` or
    `metadata.csv` in the folder or the file that `table` names, lists the images instead:
    `{"file_name": "cat.jpg", "caption": "a cat", "aesthetic": 6.1}`.

    Args:
        data_root: the folder; file names in a table are relative to it.
        table: a .jsonl, .csv or .tsv file, relative to the folder; None looks for one.
        file_column: the table's column with the file name.
        caption_column: the table's column with the caption; None means `caption`, or else `text`.
        caption: the caption of images that have none; None counts them as broken.
        filters: bounds on numbers in the table, e.g. `{aesthetic: {min: 5}, width: {min: 512}}`.
        keep: columns of the table that items hold too.
        options: see `CaptionedImages`.

    Raises:
        UserError: the folder, its table or a parameter is unusable.
    """

    def __init__(
        self,
        data_root: str,
        table: str | None = None,
        file_column: str = "file_name",
        caption_column: str | None = None,
        caption: str | None = None,
        filters: Mapping[str, Mapping[str, float]] | None = None,
        keep: Sequence[str] = (),
        **options: Any,
    ) -> None:
        root = Path(data_root)
        self.caption_column, self.caption, self.keep = caption_column, caption, tuple(keep)
        bounds = captions.check_filters(filters)
        if table is None:
            table = next((name for name in captions.TABLES if (root / name).is_file()), None)
        if table is None and (bounds or self.keep):
            raise UserError(f"{root}: filters and keep need a table of captions, such as {root / captions.TABLES[0]}")
        self.table = None if table is None else root / table
        if self.table is None:
            self.samples = [(path, None) for path in list_images(root, recursive=True)]
        else:
            rows = self._from_table(root, self.table, file_column, bounds)
            self.samples = [(path, captions.trim(row, caption_column, self.keep)) for path, row in rows]
        super().__init__(len(self.samples), f"image folder {root}", **options)

    @staticmethod
    def _from_table(
        root: Path, table: Path, file_column: str, bounds: Mapping[str, tuple[float, float]]
    ) -> list[tuple[Path, dict[str, Any]]]:
        rows = captions.read_table(table)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(file_column), str) or not row[file_column]:
                raise UserError(f"{table}: entry {number} names no file (column {file_column})")
        kept = [(root / row[file_column], row) for row in rows if captions.passes(row, bounds)]
        if rows and not kept:
            raise UserError(f"{table}: the filters leave none of {len(rows)} images")
        return kept

    def read(self, index: int) -> dict[str, Any]:
        path, row = self.samples[index]
        caption = self._caption(path, row)
        extras = captions.pick_fields(row or {}, self.keep, f"image {path}")
        return {**extras, "image": open_image(path), "caption": caption}

    def _caption(self, path: Path, row: Mapping[str, Any] | None) -> str:
        beside = row is None
        fields, column = ({"caption": captions.read_caption(path)}, None) if beside else (row, self.caption_column)
        return captions.pick_caption(fields, column, f"image {path}", self.caption)

    def image_size(self, index: int) -> tuple[int, int]:
        path, row = self.samples[index]
        return captions.pick_size(row or {}) or image_size(path)

    def files(self) -> Iterable[Path]:
        for path, row in self.samples:
            yield path
            if row is None:
                yield captions.caption_path(path)
        if self.table is not None:
            yield self.table


class ClassFolders(CaptionedImages):
    """Images in one folder a class; the caption is made of the class's name, and `class_label` is its number.

        target: ldm.data.captioned.ClassFolders
        params: {data_root: imagenet/train, names: imagenet/LOC_synset_mapping.txt, size: 256, flip_p: 0.5}

    Classes are numbered by the order of their folders' names.

    Args:
        data_root: the folder of folders.
        names: the classes' names: a mapping of folder to name, or a text file with a line a class, of which the first
            word is the folder and the rest, up to a comma, its name; None takes the folders' names, "_" as a space.
        template: the caption, {} being the class's name.
        options: see `CaptionedImages`.

    Raises:
        UserError: there are no such folders, or a class has no name.
    """

    def __init__(
        self,
        data_root: str,
        names: Mapping[str, str] | str | None = None,
        template: str = "a photo of a {}",
        **options: Any,
    ) -> None:
        root = Path(data_root)
        captions.check_template(template)
        self.samples = [(path, path.relative_to(root).parts) for path in list_images(root, recursive=True)]
        self.samples = [(path, parts[0]) for path, parts in self.samples if len(parts) > 1]
        folders = sorted({folder for _, folder in self.samples})
        self.names = Path(names) if isinstance(names, str) else None
        names = names if self.names is None else self._read_names(self.names)
        nameless = [folder for folder in folders if names is not None and folder not in names]
        if nameless:
            raise UserError(f"image folder {root}: {len(nameless)} classes have no name, such as {nameless[0]}")
        self.labels = {folder: label for label, folder in enumerate(folders)}
        self.class_names = [folder.replace("_", " ") if names is None else names[folder] for folder in folders]
        self.template = template
        super().__init__(len(self.samples), f"folder of classes {root}", **options)

    @staticmethod
    def _read_names(path: Path) -> dict[str, str]:
        try:
            lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"names of classes {path} cannot be read: {error}") from None
        return {words[0]: words[1].split(",")[0].strip() for words in lines if len(words) == 2}

    def read(self, index: int) -> dict[str, Any]:
        path, folder = self.samples[index]
        label = self.labels[folder]
        caption = self.template.replace("{}", self.class_names[label])
        return {"image": open_image(path), "caption": caption, "class_label": label}

    def image_size(self, index: int) -> tuple[int, int]:
        return image_size(self.samples[index][0])

    def files(self) -> Iterable[Path]:
        yield from (path for path, _ in self.samples)
        if self.names is not None:
            yield self.names
