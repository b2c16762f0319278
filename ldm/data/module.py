"""The data module that yaml files describe: train, validation and test sets and their loaders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.buckets import BucketSampler
from ldm.data.latent_cache import ANY_YAML, LatentCache
from ldm.data.latents import encode_dataset
from ldm.modules.randomness import sample_seed
from ldm.util import UserError, instantiate_from_config


class EpochSampler(Sampler):
    """A permutation an epoch as a function of (seed, epoch), divided among processes without padding.

    Lightning calls `set_epoch`; every process gets every `world_size`-th sample of the same permutation. The first
    pass leaves out `skip` samples: those that a resumed run saw before it was stopped. With `by_epoch` it gives
    (epoch, index), for data sets whose samples look different in every epoch.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
        by_epoch: bool = False,
    ) -> None:
        self.length, self.seed, self.shuffle, self.by_epoch = length, seed, shuffle, by_epoch
        self.rank, self.world_size, self.skip, self.epoch = rank, world_size, skip, 0
        if length < world_size:  # one of them would wait for the others for ever
            raise UserError(f"data: {length} samples cannot be divided among {world_size} processes")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, "epoch", self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        skip, self.skip = self.skip, 0
        indices = order[self.rank :: self.world_size][skip : len(self)]
        return iter([(self.epoch, index) for index in indices] if self.by_epoch else indices)


class WrappedDataset(Dataset):
    """Gives any object with `__len__` and `__getitem__` the class that DataLoader expects; the rest is the object's."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        return self.data[index]


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets from yaml sections.

    Args:
        batch_size: samples a batch and process.
        train, validation, test, predict: sections `{target, params}`; those given have loaders.
        num_workers: loader processes; None means one a core, at most 2 a sample; 0 loads in the main process.
        wrap: wrap data sets that are no torch Dataset. use_worker_init_fn: unused.
        shuffle_test_loader, shuffle_val_dataloader: shuffle the test and validation sets too.
        cache_latents: train on the images' posterior moments: true encodes them once, before training; the name of a
            folder reads what scripts/cache_latents.py wrote there, embeddings of captions included. Mirroring goes on
            as without; a random crop stays the first epoch's.
    """

    def __init__(
        self,
        batch_size: int,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        predict: Any = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        cache_latents: bool | str = False,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"yaml: data.params.batch_size must be a whole number of at least 1, not {batch_size!r}")
        self.batch_size = batch_size
        self.dataset_configs = {
            name: config
            for name, config in dict(train=train, validation=validation, test=test, predict=predict).items()
            if config is not None
        }
        self.num_workers = min(2 * batch_size, os.cpu_count() or 1) if num_workers is None else num_workers
        self.shuffled = {"train": True, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.wrap, self.cache_latents = wrap, cache_latents
        self.seed, self.words = 23, ANY_YAML  # the trainer sets the run's
        self.datasets: dict[str, Any] = {}
        for name in ("train", "test", "predict"):
            if name in self.dataset_configs:
                setattr(self, f"{name}_dataloader", lambda name=name: self.loader(name))
        if validation is not None:
            self.val_dataloader = lambda: self.loader("validation")

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once."""
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                dataset = instantiate_from_config(config)
                if isinstance(dataset, Sized) and len(dataset) == 0:
                    raise UserError(f"data: the {name} set ({config['target']}) is empty")
                wrap = self.wrap and not isinstance(dataset, Dataset)
                self.datasets[name] = WrappedDataset(dataset) if wrap else dataset

    def encode(self, model: nn.Module, device: torch.device) -> None:
        """With `cache_latents`, encode the training images by the model's autoencoder, on `device`, or read the cache.

        Raises:
            UserError: the model has no such autoencoder, or the cache is not of this model and this data.
        """
        if not self.cache_latents:
            return
        if not hasattr(model, "first_stage_model"):
            raise UserError(
                f"yaml: data.params.cache_latents: {type(model).__name__} has no autoencoder to encode with"
            )
        train = self.datasets["train"]
        if isinstance(self.cache_latents, str):
            cache = LatentCache(self.cache_latents)
            self.datasets["train"] = cache.stand_in(train, self.dataset_configs["train"], model, self.words)
        else:
            model.first_stage_model.to(device)
            self.datasets["train"] = encode_dataset(train, model.first_stage_model, model.first_stage_key)

    def batches_done(self) -> int:
        """Batches of the present epoch that a resumed run has behind it."""
        if self.trainer is None or not self.trainer.ckpt_path:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _begin_at_epoch(self, sampler: EpochSampler | BucketSampler, name: str) -> None:
        """Loader processes read ahead before Lightning sets the epoch, which is not 0 in a resumed run."""
        if name == "train" and self.trainer is not None:
            sampler.set_epoch(self.trainer.current_epoch)

    def loader(self, name: str) -> DataLoader:
        """The loader of one of the data sets."""
        dataset = self.datasets[name]
        shuffle = self.shuffled.get(name, False)
        options = dict(batch_size=self.batch_size, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return DataLoader(dataset, **options)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        done = self.batches_done() if name == "train" else 0
        by_epoch = name == "train" and getattr(dataset, "by_epoch", False)
        options["persistent_workers"] = self.num_workers > 0
        if getattr(dataset, "bucket_of", None) is not None:
            del options["batch_size"]
            batches = BucketSampler(
                dataset.bucket_of, self.batch_size, self.seed, shuffle, rank, world, done, by_epoch, name == "train"
            )
            self._begin_at_epoch(batches, name)
            if rank == 0:
                print(f"data: {name}: {batches.summary()}")
            return DataLoader(dataset, batch_sampler=batches, **options)
        sampler = EpochSampler(len(dataset), self.seed, shuffle, rank, world, self.batch_size * done, by_epoch)
        self._begin_at_epoch(sampler, name)
        drop_last = name == "train" and len(sampler) >= self.batch_size
        return DataLoader(dataset, sampler=sampler, drop_last=drop_last, **options)
