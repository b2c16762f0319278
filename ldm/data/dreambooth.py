"""DreamBooth's data module: photos of the subject paired with prior images, encoded once before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data import module
from ldm.data.personalized_dream import PersonalizedBase

FLIPS = (False, True)


Size = tuple[int, int] | None  # (width, height); None for a photo's own


class EncodedPhotos(Dataset):
    """Photos as posterior moments of both flips; item i is dict(moments [2C, h, w], caption).

    A fresh latent can be drawn from the moments at every step, without encoding the photo again.

    Args:
        moments: for every size, and for each photo, the moments [versions, 2, 2C, h, w] of its versions and flips.
    """

    def __init__(self, photos: PersonalizedBase, moments: Mapping[Size, Sequence[torch.Tensor]]) -> None:
        self.photos, self.moments = photos, moments

    def __len__(self) -> int:
        return len(self.photos)

    def at(self, item: int, size: Size) -> dict:
        """Item `item` in one of the sizes."""
        index, flip = self.photos.choose(item)
        moments = self.moments[size][index][self.photos.version(item), int(flip)]
        return {"moments": moments, "caption": self.photos.caption(index)}

    def __getitem__(self, item: int) -> dict:
        return self.at(item, None)


@torch.no_grad()
def encode_photos(
    photos: PersonalizedBase, first_stage: nn.Module, name: str, sizes: Sequence[Size] = (None,)
) -> EncodedPhotos:
    """Encode every version of every photo, and its mirror image, once in every size."""
    device = next(first_stage.parameters()).device
    bar = tqdm(total=photos.num_images * len(sizes), desc=f"Encoding the {name} images", unit="image")
    moments: dict[Size, list[torch.Tensor]] = {}
    for size in sizes:
        moments[size] = []
        for index in range(photos.num_images):
            both = [
                torch.cat([_encode(first_stage, photos.image(index, flip, version, size), device) for flip in FLIPS])
                for version in range(photos.versions)
            ]
            moments[size].append(torch.stack(both))
            bar.update()
    bar.close()
    return EncodedPhotos(photos, moments)


def _encode(first_stage: nn.Module, image: np.ndarray, device: torch.device) -> torch.Tensor:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().to(device)
    return first_stage.encode(pixels).parameters.cpu()


class Pairs(Dataset):
    """Item i is {"instance": instances[i], "prior": priors[i]}: the shorter goes round, the prior may be missing.

    Where instances have sizes of their own, the prior has that of its instance, and batches are of one size each.
    """

    def __init__(self, instances: Any, priors: Any | None = None) -> None:
        self.instances, self.priors = instances, priors
        photos = getattr(instances, "photos", None)
        self.bucket_of = getattr(photos, "bucket_of", None)

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, item: int) -> dict:
        pair = {"instance": self.instances[item]}
        if self.priors is not None:
            place = item % len(self.priors)
            if self.bucket_of is None:
                pair["prior"] = self.priors[place]
            else:
                photos = self.instances.photos
                pair["prior"] = self.priors.at(place, photos.size_of(photos.choose(item)[0]))
        return pair


class DataModuleFromConfig(module.DataModuleFromConfig):
    """As the other data module, with prior images beside the photos.

    Args:
        batch_size: photos a batch and process, and as many prior images.
        train: section of the photos. reg: section of the prior images, with which they are paired; None for none.
    """

    def __init__(self, batch_size: int, train: Any = None, reg: Any = None, **kwargs: Any) -> None:
        super().__init__(batch_size, train=train, **kwargs)
        if reg is not None:
            self.dataset_configs["reg"] = reg

    def encode(self, model: nn.Module, device: torch.device) -> None:
        """Encode the photos with the model's autoencoder and pair them; prompts are encoded by the model."""
        model.first_stage_model.to(device)
        train = self.datasets["train"]
        sets = [encode_photos(train, model.first_stage_model, "train")]
        if "reg" in self.datasets:
            sizes = list(dict.fromkeys(train.size_of(index) for index in range(train.num_images)))
            sets.append(encode_photos(self.datasets["reg"], model.first_stage_model, "reg", sizes))
        self.datasets["train"] = Pairs(*sets)
