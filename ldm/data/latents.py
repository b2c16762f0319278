"""Training images encoded once: posterior moments in place of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ldm.errors import UserError


class Versions(Dataset):
    """Item i is (i, images [V, H, W, 3], what else sample i holds); V = 2 where the set mirrors some, else 1."""

    def __init__(self, dataset: Any, image_key: str) -> None:
        self.dataset, self.image_key = dataset, image_key

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, dict[str, Any]]:
        mirrors = hasattr(self.dataset, "versions")
        sample = dict(self.dataset.versions(index) if mirrors else self.dataset[index])
        if self.image_key not in sample:
            raise UserError(f"data: the samples hold {', '.join(sample)}, but first_stage_key is '{self.image_key}'")
        images = np.asarray(sample.pop(self.image_key))
        return index, images if mirrors else images[None], sample


def check_numbered(dataset: Any) -> None:
    """Raise UserError for a set that is read as a stream: its samples have no numbers to keep their latents by."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UserError(
            f"data: latents of {type(dataset).__name__} cannot be cached: it is a stream; give a set with a length, "
            "such as ldm.data.shards.Shards, or train without cache_latents"
        )


def order_of(dataset: Any) -> list[int]:
    """The samples that a set shows, those of one bucket together."""
    bucket_of = getattr(dataset, "bucket_of", None)
    if bucket_of is None:
        return list(range(len(dataset)))
    order = np.argsort(bucket_of, kind="stable")
    return order[bucket_of[order] >= 0].tolist()


@torch.no_grad()
def encode_samples(
    dataset: Any,
    indices: Sequence[int],
    first_stage: nn.Module,
    image_key: str = "image",
    batch_size: int = 32,
    num_workers: int = 0,
) -> Iterator[tuple[int, torch.Tensor, dict[str, Any]]]:
    """(index, moments [V, 2C, h, w], what else it holds) of every sample, see `Versions`.

    Raises:
        UserError: the first stage gives no posterior moments.
    """
    device = next((parameter.device for parameter in first_stage.parameters()), "cpu")
    loader = DataLoader(
        Versions(dataset, image_key), batch_size, sampler=indices, num_workers=num_workers, collate_fn=list
    )
    for items in loader:
        for _, alike in groupby(items, key=lambda item: item[1].shape):
            numbers, images, rest = zip(*alike, strict=True)
            pictures = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
            posterior = first_stage.encode(pictures.contiguous().float().to(device))
            if not hasattr(posterior, "parameters"):
                raise UserError(f"data: latents cannot be cached: {type(first_stage).__name__} has no posterior")
            moments = posterior.parameters.cpu().contiguous().split(len(images[0]))
            yield from zip(numbers, map(torch.clone, moments), rest, strict=True)  # a part would be kept with its whole


class MomentsDataset(Dataset):
    """A data set whose images were encoded: items hold `moments` [2C, h, w] in place of the image.

    Args:
        dataset: the set that was encoded, which says what is mirrored in which epoch.
        rest: what else each sample holds.
        read: gives the moments [V, 2C, h, w] of a sample.
    """

    def __init__(self, dataset: Any, rest: Sequence[dict[str, Any]], read: Callable[[int], torch.Tensor]) -> None:
        self.rest, self.read = rest, read
        self.framing = getattr(dataset, "framing", None)
        self.by_epoch = getattr(dataset, "by_epoch", False)
        self.bucket_of = getattr(dataset, "bucket_of", None)

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rest = self.rest[index]
        versions = self.read(index)
        mirrored = len(versions) > 1 and self.framing.choose(epoch, rest["index"])[0]
        return {**rest, "moments": versions[int(mirrored)].float()}


def encode_dataset(
    dataset: Any, first_stage: nn.Module, image_key: str = "image", batch_size: int = 32, num_workers: int = 0
) -> MomentsDataset:
    """Encode every image of `dataset` once, into memory; processes that have met share the work.

    Raises:
        UserError: the set is a stream, or the first stage gives no posterior moments.
    """
    check_numbered(dataset)
    moments: list[torch.Tensor | None] = [None] * len(dataset)
    rest: list[dict[str, Any]] = [{}] * len(dataset)
    order = order_of(dataset)
    rank, world = (dist.get_rank(), dist.get_world_size()) if have_met() else (0, 1)
    samples = encode_samples(dataset, order[rank::world], first_stage, image_key, batch_size, num_workers)
    with tqdm(total=len(order), desc="Encoding the training images", unit="image", disable=rank > 0) as bar:
        for part in of_all_processes(samples, -(-len(order) // world), batch_size):
            for index, versions, others in part:
                moments[index], rest[index] = versions, others
            bar.update(len(part))
    return MomentsDataset(dataset, rest, moments.__getitem__)


def have_met() -> bool:
    """Whether the processes of a run know of each other by now; one alone has none to meet."""
    return dist.is_available() and dist.is_initialized()


def of_all_processes(own: Iterator[Any], most: int, at_once: int) -> Iterator[list[Any]]:
    """Lists of what every process's iterator gives, at most `most` each, `at_once` from each at a time.

    Raises:
        UserError: the iterator of one of them did; it is raised in all.
    """
    group = dist.new_group(backend="gloo") if have_met() else None  # lists are the CPU's
    for _ in range(0, most, at_once):
        try:
            found: list[Any] | UserError = list(islice(own, at_once))
        except UserError as error:
            found = error
        parts = [found] * (1 if group is None else dist.get_world_size())
        if group is not None:
            dist.all_gather_object(parts, found, group=group)
        for part in parts:
            if isinstance(part, UserError):
                raise part
        yield [item for part in parts for item in part]
