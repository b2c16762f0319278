"""DreamBooth's data module: photos of the subject paired with prior images, encoded once before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data import module
from ldm.data.personalized_dream import PersonalizedBase


class EncodedPhotos(Dataset):
    """Photos as posterior moments of both flips; item i is dict(moments [2C, h, w], caption).

    A fresh latent can be drawn from the moments at every step, without encoding the photo again.
    """

    def __init__(self, photos: PersonalizedBase, moments: torch.Tensor) -> None:
        self.photos, self.moments = photos, moments

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, item: int) -> dict:
        index, flip = self.photos.choose(item)
        return {"moments": self.moments[index, int(flip)], "caption": self.photos.caption(index)}


@torch.no_grad()
def encode_photos(photos: PersonalizedBase, first_stage: nn.Module, name: str) -> EncodedPhotos:
    """Encode every photo, and its mirror image, once."""
    device = next(first_stage.parameters()).device
    rows = []
    for index in tqdm(range(photos.num_images), desc=f"Encoding the {name} images", unit="image"):
        images = torch.stack([torch.from_numpy(photos.image(index, flip)) for flip in (False, True)])
        images = images.permute(0, 3, 1, 2).contiguous().to(device)
        rows.append(torch.cat([first_stage.encode(image[None]).parameters.cpu() for image in images]))
    return EncodedPhotos(photos, torch.stack(rows))


class Pairs(Dataset):
    """Item i is {"instance": instances[i], "prior": priors[i]}: the shorter goes round, the prior may be missing."""

    def __init__(self, instances: Any, priors: Any | None = None) -> None:
        self.instances, self.priors = instances, priors

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, item: int) -> dict:
        pair = {"instance": self.instances[item]}
        if self.priors is not None:
            pair["prior"] = self.priors[item % len(self.priors)]
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
        sets = [encode_photos(self.datasets[name], model.first_stage_model, name)
                for name in ("train", "reg") if name in self.datasets]  # fmt: skip
        self.datasets["train"] = Pairs(*sets)
