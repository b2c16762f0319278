"""What every autoencoder has: an encoder, a decoder, averaged weights, training with a discriminator, pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.randomness import Randomness, SampleRandom
from ldm.util import UserError, instantiate_from_config


class Autoencoder(pl.LightningModule, ABC):
    """Images [B, C, H, W] in [-1, 1] <-> latents, between which lies what a subclass adds.

    With a discriminator in its loss it is trained by manual optimisation: autoencoder and discriminator by
    turns, on the same reconstructions, with one pass of the autoencoder a step.

    Args:
        ddconfig: the encoder's and decoder's sizes.
        lossconfig: the training loss; None or `torch.nn.Identity` for none.
        image_key: the batch entry that holds the images. monitor: the logged quantity that chooses the best checkpoint.
        colorize_nlabels: channels of inputs that are no pictures (segmentations), shown in random colours.
        learning_rate: of the optimisers; the trainer sets it. scheduler_config: its multiplier by step.
        lr_g_factor: times this for the autoencoder.
    """

    PARTS: tuple[str, ...] = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    ENCODING: tuple[str, ...] = ("encoder", "quant_conv")  # of PARTS, those that decide what the latents are

    def __init__(
        self,
        ddconfig: Any,
        lossconfig: Any = None,
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Any = None,
        learning_rate: float = 4.5e-6,
        lr_g_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_key, self.monitor, self.learning_rate = image_key, monitor, learning_rate
        self.scheduler_config, self.lr_g_factor = scheduler_config, lr_g_factor
        self.accumulate_grad_batches, self.gradient_clip_val = 1, None  # the trainer's; see configure_callbacks
        self.seed, self.batches_seen = 0, 0
        self.use_ema = False
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = nn.Identity() if lossconfig is None else instantiate_from_config(lossconfig)
        self.automatic_optimization = getattr(self.loss, "discriminator", None) is None
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    def complete(
        self,
        ckpt_path: str | None,
        ignore_keys: Sequence[str],
        use_ema: bool,
        ema_decay: float,
        decoder_only: bool,
    ) -> None:
        """The end of a subclass's construction, when all its parts are there."""
        if decoder_only:
            for name in self.ENCODING:
                getattr(self, name).requires_grad_(False)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self._averaged(), decay=ema_decay)
        if ckpt_path is not None:
            from ldm.checkpoint import load_into

            load_into(self, ckpt_path, ignore_keys=ignore_keys)

    # ---- what a subclass says of itself --------------------------------------------------------------------

    @abstractmethod
    def reconstruct(self, x: torch.Tensor, random: Randomness) -> tuple[torch.Tensor, Any]:
        """Reconstructions of `x` as in training, and what `losses` needs beside them."""

    @abstractmethod
    def losses(
        self, x: torch.Tensor, reconstructions: torch.Tensor, latents: Any, index: int, **others: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The autoencoder's loss (index 0) or the discriminator's (1), and what to log."""

    @abstractmethod
    def pictures(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures to log beside the inputs `x`."""

    # ---- images --------------------------------------------------------------------------------------------

    def get_last_layer(self) -> torch.Tensor:
        """The decoder's last weight, at which the adversarial loss is balanced."""
        return self.decoder.last_layer

    def get_input(self, batch: dict, key: str) -> torch.Tensor:
        """Images [B, C, H, W] from a batch that holds [B, H, W, C] or [B, H, W] under `key`."""
        x = batch[key]
        x = x[..., None] if x.ndim == 3 else x
        return x.permute(0, 3, 1, 2).float()

    def training_input(self, batch: dict, random: Randomness) -> torch.Tensor:
        """Images to train on; a subclass may change them at random."""
        return self.get_input(batch, self.image_key)

    # ---- averaged weights ----------------------------------------------------------------------------------

    def _averaged(self) -> nn.ModuleDict:
        """What the average is taken of: the autoencoder without its loss."""
        return nn.ModuleDict({name: getattr(self, name) for name in self.PARTS})

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within the block the autoencoder holds the averaged weights."""
        if not self.use_ema:
            yield
            return
        averaged = self._averaged()
        self.model_ema.store(averaged.parameters())
        self.model_ema.copy_to(averaged)
        try:
            yield
        finally:
            self.model_ema.restore(averaged.parameters())

    # ---- training ------------------------------------------------------------------------------------------

    def step_random(self, batch_size: int) -> Randomness:
        """Random numbers for the present training batch, a function of (seed, batch number, sample index)."""
        return self.random_of(self.batches_seen, batch_size)

    def random_of(self, batch: int, batch_size: int) -> Randomness:
        """Random numbers for this process's samples of the batch with a number."""
        rank, world = (self.global_rank, self.trainer.world_size) if self._trainer is not None else (0, 1)
        return SampleRandom(self.seed, batch, rank, batch_size, self.device, world)

    def configure_callbacks(self) -> list:
        """With a discriminator, take accumulation and clipping over from the trainer.

        Lightning refuses a trainer that has them together with manual optimisation; it calls this before it looks.
        """
        if not self.automatic_optimization:
            trainer = self.trainer
            self.accumulate_grad_batches *= trainer.accumulate_grad_batches
            self.gradient_clip_val = trainer.gradient_clip_val or self.gradient_clip_val
            trainer.accumulate_grad_batches, trainer.gradient_clip_val = 1, None
        return []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        random = self.step_random(len(batch[self.image_key]))
        x = self.training_input(batch, random)
        reconstructions, latents = self.reconstruct(x, random)
        self.batches_seen += 1
        if self.automatic_optimization:
            loss, logs = self.losses(x, reconstructions, latents, 0)
        else:
            loss, logs = self._adversarial_step(x, reconstructions, latents, batch_idx)
        self.log_dict(logs, batch_size=len(x))
        return loss

    def _adversarial_step(
        self, x: torch.Tensor, reconstructions: torch.Tensor, latents: Any, batch_idx: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step of the autoencoder and, from `disc_start` on, one of the discriminator."""
        generator, discriminator = self.optimizers()
        active = [generator, discriminator] if self.loss.discriminator_active(self.global_step) else [generator]
        losses, logs = [], {}
        for index, optimizer in enumerate(active):
            self.toggle_optimizer(optimizer)
            loss, of_one = self.losses(x, reconstructions, latents, index, last_layer=self.get_last_layer())
            self.manual_backward(loss / self.accumulate_grad_batches)
            self.untoggle_optimizer(optimizer)
            losses.append(loss.detach())
            logs |= of_one
        if (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            self._step_optimizers(active)
        return losses[0], logs

    def _step_optimizers(self, optimizers: Sequence[Any]) -> None:
        for index, optimizer in enumerate(optimizers):
            if self.gradient_clip_val:
                self.clip_gradients(optimizer, self.gradient_clip_val, gradient_clip_algorithm="norm")
            if index == 0:
                optimizer.step()
            else:  # not through Lightning's wrapper, which would count it as one more global step
                self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
            optimizer.zero_grad()
        if self.scheduler_config is not None:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        self._average()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._average()

    def _average(self) -> None:
        """Take the averaged weights along, within the step, so that a checkpoint of this step holds it."""
        if self.use_ema:
            self.model_ema(self._averaged())

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.batches_seen = checkpoint.get("batches_seen", 0)

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x = self.get_input(batch, self.image_key)
        random = self.random_of(-1 - batch_idx, len(x))
        with self.ema_scope():
            reconstructions, latents = self.reconstruct(x, random)
        for index in range(1 if self.automatic_optimization else 2):
            _, logs = self.losses(x, reconstructions, latents, index, split="val")
            self.log_dict(logs, batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if isinstance(self.loss, nn.Identity):
            raise UserError("yaml: lossconfig: torch.nn.Identity is no loss to train an autoencoder with")
        judge = [] if self.automatic_optimization else list(self.loss.discriminator.parameters())
        excluded = {id(parameter) for parameter in judge}
        autoencoder = [p for p in self.parameters() if p.requires_grad and id(p) not in excluded]
        optimizers = [
            torch.optim.Adam(parameters, lr=factor * self.learning_rate, betas=(0.5, 0.9))
            for parameters, factor in ((autoencoder, self.lr_g_factor), (judge, 1.0))
            if parameters
        ]
        if self.scheduler_config is None:
            return optimizers
        schedule = instantiate_from_config(self.scheduler_config).schedule
        schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]

    # ---- pictures ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: dict, N: int = 8, only_inputs: bool = False, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Pictures in [-1, 1] for the log: inputs, their reconstructions, and what else a subclass shows."""
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        logs = {"inputs": x}
        if not only_inputs:
            with self.ema_scope():
                logs |= self.pictures(x)
        return {name: self.to_rgb(images) for name, images in logs.items()} if x.shape[1] > 3 else logs

    def to_rgb(self, x: torch.Tensor) -> torch.Tensor:
        """Random but constant colours [B, 3, H, W] in [-1, 1] for the channels of `x` [B, C, H, W]."""
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1, device=x.device))
        x = F.conv2d(x, self.colorize.to(x))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0
