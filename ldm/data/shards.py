"""Captioned images from tar shards as webdataset keeps them, read at random without that package.

A shard holds the files of a sample under one name: `000012.jpg`, `000012.json`, perhaps `000012.txt`. What is where
is read once at the start; samples are then read from their place in the file, in any order, so that shuffling and
resuming are as exact as with a folder.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data import captions
from ldm.data.base import SUFFIXES, image_size, open_image
from ldm.data.captioned import CaptionedImages
from ldm.errors import UserError


@dataclass(frozen=True)
class ShardSample:
    """Where in which shard a sample's image lies, in bytes, and the sample's caption and other fields."""

    shard: Path
    name: str
    offset: int
    size: int
    fields: dict[str, Any]


def find_shards(shards: str | Sequence[str]) -> list[Path]:
    """The .tar files of a folder, a pattern with * and ?, or a list of such, each sorted by name.

    Raises:
        UserError: one of them names no shard.
    """
    found = []
    for entry in [shards] if isinstance(shards, str) else shards:
        pattern = str(Path(glob.escape(entry)) / "*.tar") if Path(entry).is_dir() else entry
        paths = [Path(entry)] if Path(entry).is_file() else sorted(map(Path, glob.glob(pattern)))
        if not paths:
            raise UserError(f"shards {entry}: there are no such .tar files; give a folder, a file or a pattern")
        found.extend(paths)
    return found


def _fields(tar: tarfile.TarFile, files: Mapping[str, tarfile.TarInfo]) -> dict[str, Any]:
    """What a sample's .json says, and the text of its .txt as `text`; nothing where they are unreadable."""
    fields: dict[str, Any] = {}
    if ".txt" in files:
        fields["text"] = tar.extractfile(files[".txt"]).read().decode("utf-8-sig", errors="replace")
    if ".json" in files:
        try:
            read = json.load(tar.extractfile(files[".json"]))
        except (ValueError, RecursionError):
            read = None
        fields |= read if isinstance(read, dict) else {}
    return fields


def read_shard(path: Path) -> list[ShardSample]:
    """The samples of a shard that have an image, in the order in which they lie there.

    Raises:
        UserError: the file is missing, cut off, or no plain tar file.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                if member.isfile() and not member.issparse() and not place.name.startswith("."):
                    stem, _, kind = place.name.partition(".")
                    samples.setdefault(str(place.parent / stem), {})[f".{kind.lower()}"] = member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"no file begins at byte {tar.offset}")
            return [
                ShardSample(path, f"{path}:{member.name}", member.offset_data, member.size, _fields(tar, files))
                for files in samples.values()
                for member in [file for kind, file in files.items() if kind in SUFFIXES][:1]
            ]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"shard {path} is cut off or no plain .tar file ({error}); fetch it again") from None


class Shards(CaptionedImages):
    """The images of webdataset shards, with captions from their .json or .txt.

        target: ldm.data.shards.Shards
        params: {shards: laion/*.tar, size: 512, filters: {aesthetic: {min: 5}, punsafe: {max: 0.5}}, keep: [aesthetic]}

    Args:
        shards: a folder, a file or a pattern on this machine, or a list of them.
        caption_column: the .json's field with the caption; None means `caption`, or else `text` or the .txt.
        filters: bounds on numbers in the .json; a sample without them is left out.
        keep: fields of the .json that items hold too.
        options: see `CaptionedImages`.

    Raises:
        UserError: there is no such shard, one is unreadable, or the filters leave nothing.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        caption_column: str | None = None,
        filters: Mapping[str, Mapping[str, float]] | None = None,
        keep: Sequence[str] = (),
        **options: Any,
    ) -> None:
        bounds = captions.check_filters(filters)
        self.caption_column, self.keep = caption_column, tuple(keep)
        self.samples, found = [], 0
        for path in find_shards(shards):
            samples = read_shard(path)
            found += len(samples)
            self.samples += [
                replace(sample, fields=captions.trim(sample.fields, caption_column, keep))
                for sample in samples
                if captions.passes(sample.fields, bounds)
            ]
        if found and not self.samples:
            raise UserError(f"shards {shards}: the filters leave none of {found} images")
        super().__init__(len(self.samples), f"shards {shards}", **options)

    def read(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        caption = captions.pick_caption(sample.fields, self.caption_column, sample.name)
        extras = captions.pick_fields(sample.fields, self.keep, sample.name)
        return {**extras, "image": open_image(self._contents(sample), sample.name), "caption": caption}

    @staticmethod
    def _contents(sample: ShardSample) -> io.BytesIO:
        try:
            with open(sample.shard, "rb") as file:
                file.seek(sample.offset)
                return io.BytesIO(file.read(sample.size))
        except OSError as error:
            raise UserError(f"shard {sample.shard} cannot be read: {error}") from None

    def image_size(self, index: int) -> tuple[int, int]:
        sample = self.samples[index]
        return captions.pick_size(sample.fields) or image_size(self._contents(sample), sample.name)

    def files(self) -> Iterable[Path]:
        return sorted({sample.shard for sample in self.samples})
