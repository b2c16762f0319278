"""Aspect-ratio buckets: training pictures keep about their own aspect, and every batch is of one size.

The way is NovelAI's ("NovelAI improvements on Stable Diffusion", 2022, section "aspect ratio bucketing").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Sampler

from ldm.errors import UserError
from ldm.modules.randomness import sample_seed


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures may have: sides in steps, with no more pixels than a square of `size` has.

    Args:
        size: pixels a side of that square.
        step: what every side is a multiple of; the networks want 64.
        min_side, max_side: pixels of the shortest and the longest side; None means half and twice `size`.

    Raises:
        UserError: the numbers leave no sizes.
    """

    size: int
    step: int = 64
    min_side: int | None = None
    max_side: int | None = None

    @classmethod
    def of(cls, options: bool | Mapping[str, int], size: int | None) -> Buckets | None:
        """What a yaml's `buckets:` says beside `size:`; None for false.

        Raises:
            UserError: it is something else than true, false or this class's parameters, or there is no size.
        """
        if options is False or options is None:
            return None
        known = [field.name for field in fields(cls) if field.name != "size"]
        options = {} if options is True else options
        if not isinstance(options, Mapping) or not set(options) <= set(known):
            raise UserError(f"yaml: buckets is {options!r}; it may be true, or a mapping of {', '.join(known)}")
        if size is None:
            raise UserError("yaml: buckets need a size: the side of a square with as many pixels as pictures may have")
        return cls(size, **options)

    def __post_init__(self) -> None:
        for name in ("step", "min_side", "max_side"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"yaml: buckets: {name} is {value!r}; it must be a whole number of pixels")
        if not self.sizes:
            raise UserError(f"yaml: buckets: no picture has sides in steps of {self.step} and {self.size}² pixels")

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every bucket: for each width the greatest height, and turned."""
        least = -(-(self.min_side or self.size // 2) // self.step) * self.step
        most = (self.max_side or 2 * self.size) // self.step * self.step
        square = self.size // self.step * self.step
        found = {(square, square)} if least <= square <= most else set()
        for width in range(least, most + 1, self.step):
            height = min(most, self.size**2 // width // self.step * self.step)
            if height >= least:
                found |= {(width, height), (height, width)}
        return tuple(sorted(found))

    def nearest(self, sizes: np.ndarray) -> np.ndarray:
        """The number [N] of the bucket whose aspect is nearest to that of each (width, height) [N, 2].

        Of buckets with the same aspect it is the largest.
        """
        own = np.log([width / height for width, height in self.sizes])
        area = np.array([width * height for width, height in self.sizes])
        best = np.empty(len(sizes), dtype=np.int64)
        for part in np.array_split(np.arange(len(sizes)), len(sizes) // 100_000 + 1):  # [part, buckets] at a time
            ratio = np.log(sizes[part, 0] / sizes[part, 1])
            distance = np.abs(ratio[:, None] - own).round(9)
            best[part] = np.where(distance == distance.min(1, keepdims=True), area, 0).argmax(1)
        return best


class BucketSampler(Sampler):
    """Batches of one bucket each, as a function of (seed, epoch), divided among processes.

    At every step the processes share one batch of `world_size * batch_size` samples of one bucket, so that noise can
    be assigned over all of them. A sample comes at most once an epoch; what does not fill such a batch is left out,
    in every epoch others. If no bucket can fill one, none need be full.

    Args:
        bucket_of: the bucket [N] of every sample; those below 0 are left out.
        skip: batches that a resumed run has behind it, left out of the first pass.
        by_epoch: give (epoch, index).
        drop_last: leave out what does not fill a batch; otherwise only what cannot be divided among the processes.
    """

    def __init__(
        self,
        bucket_of: np.ndarray,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
        by_epoch: bool = False,
        drop_last: bool = True,
    ) -> None:
        self.bucket_of = torch.from_numpy(bucket_of)
        self.seed, self.shuffle, self.by_epoch = seed, shuffle, by_epoch
        self.rank, self.world_size, self.skip, self.epoch = rank, world_size, skip, 0
        self.together = batch_size * world_size
        self.counts = torch.bincount(self.bucket_of[self.bucket_of >= 0]).tolist()
        full = sum(count // self.together for count in self.counts)
        self.drop_last = drop_last and full > 0
        self.batches = full if self.drop_last else sum(
            -(-(count // world_size) // batch_size) for count in self.counts
        )  # fmt: skip
        if self.batches == 0:
            raise UserError(f"data: no bucket holds the {world_size} pictures that {world_size} processes need")

    @property
    def sampler(self) -> BucketSampler:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def summary(self) -> str:
        """What an epoch shows and leaves out, in one line."""
        total, filled = sum(self.counts), [count for count in self.counts if count]
        told = f"{total} pictures in {len(filled)} sizes; an epoch has {self.batches} batches of {self.together}"
        if not self.drop_last:
            return f"{told} or fewer"
        never = sum(count for count in filled if count < self.together)
        left = total - self.batches * self.together
        told += f" and leaves out {left} pictures"
        return f"{told}, {never} of them always: fewer than {self.together} have their size" if never else told

    def __iter__(self) -> Iterator[list[int] | list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, "epoch", self.epoch))
        order = torch.arange(len(self.bucket_of))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator)
        order = order[self.bucket_of[order] >= 0]
        order = order[torch.argsort(self.bucket_of[order], stable=True)]
        batches = [batch for bucket in order.split(self.counts) for batch in self._divide(bucket)]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        skip, self.skip = self.skip, 0
        for batch in batches[skip:]:
            own = batch[self.rank :: self.world_size].tolist()
            yield [(self.epoch, index) for index in own] if self.by_epoch else own

    def _divide(self, bucket: torch.Tensor) -> list[torch.Tensor]:
        """The batches that all processes share, from the shuffled samples of a bucket."""
        least = self.together if self.drop_last else self.world_size
        return [part[: len(part) // least * least] for part in bucket.split(self.together) if len(part) >= least]
