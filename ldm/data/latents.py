"""Training images encoded once: posterior moments in place of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
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
            yield from zip(numbers, posterior.parameters.cpu().split(len(images[0])), rest, strict=True)


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
    """Encode every image of `dataset` once, into memory.

    Raises:
        UserError: the first stage gives no posterior moments.
    """
    moments: list[torch.Tensor | None] = [None] * len(dataset)
    rest: list[dict[str, Any]] = [{}] * len(dataset)
    order = order_of(dataset)
    samples = encode_samples(dataset, order, first_stage, image_key, batch_size, num_workers)
    for index, versions, others in tqdm(samples, "Encoding the training images", len(order), unit="image"):
        moments[index], rest[index] = versions, others
    return MomentsDataset(dataset, rest, moments.__getitem__)
