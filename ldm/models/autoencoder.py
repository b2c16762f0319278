"""Autoencoders: the first stage of latent diffusion (Rombach et al., 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.randomness import Randomness, SampleRandom
from ldm.util import UserError, instantiate_from_config


class AutoencoderKL(pl.LightningModule):
    """Images [B, 3, H, W] in [-1, 1] <-> a Gaussian over latents [B, embed_dim, H/f, W/f].

    With a discriminator in its loss it is trained by manual optimisation: autoencoder and discriminator by
    turns, on the same reconstructions, with one pass of the autoencoder a step.

    Args:
        ddconfig: the encoder's and decoder's sizes. embed_dim: channels of the latents.
        lossconfig: the training loss; None or `torch.nn.Identity` for none.
        ckpt_path: weights to begin with, without keys that begin with one of `ignore_keys`.
        colorize_nlabels: channels of inputs that are no pictures (segmentations), shown in random colours.
        learning_rate: of the optimisers; the trainer sets it. scheduler_config: its multiplier by step.
        use_ema: keep an average of the weights, of `ema_decay`.
        decoder_only: train the decoder alone; latents stay as they are, and so do the models built on them.
        accumulate_grad_batches, gradient_clip_val: of training with a discriminator, where Lightning's
            trainer takes neither.

    Raises:
        UserError: ddconfig does not describe this autoencoder.
    """

    def __init__(
        self,
        ddconfig: Any,
        embed_dim: int,
        lossconfig: Any = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Any = None,
        learning_rate: float = 4.5e-6,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        decoder_only: bool = False,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
    ) -> None:
        super().__init__()
        if not ddconfig.get("double_z", True):
            raise UserError("yaml: ddconfig.double_z: AutoencoderKL needs true, for a mean and a variance")
        self.image_key, self.monitor, self.learning_rate = image_key, monitor, learning_rate
        self.scheduler_config, self.embed_dim = scheduler_config, embed_dim
        self.accumulate_grad_batches, self.gradient_clip_val = accumulate_grad_batches, gradient_clip_val
        self.seed, self.batches_seen = 0, 0
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = nn.Identity() if lossconfig is None else instantiate_from_config(lossconfig)
        self.automatic_optimization = getattr(self.loss, "discriminator", None) is None
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if decoder_only:
            self.encoder.requires_grad_(False)
            self.quant_conv.requires_grad_(False)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self._averaged(), decay=ema_decay)
        if ckpt_path is not None:
            from ldm.checkpoint import load_into

            load_into(self, ckpt_path, ignore_keys=ignore_keys)

    # ---- images and latents --------------------------------------------------------------------------------

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior of images [B, 3, H, W] in [-1, 1]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of about [-1, 1] from latents [B, embed_dim, H/f, W/f]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: torch.Tensor, sample_posterior: bool = True, random: Randomness | None = None
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Reconstructions, of a draw from the posterior or of its mean, and the posterior."""
        posterior = self.encode(x)
        if not sample_posterior:
            z = posterior.mode()
        elif random is None:
            z = posterior.sample()
        else:
            z = posterior.mean + posterior.std * random.randn_like(posterior.mean)
        return self.decode(z), posterior

    def get_last_layer(self) -> torch.Tensor:
        """The decoder's last weight, at which the adversarial loss is balanced."""
        return self.decoder.last_layer

    def get_input(self, batch: dict, key: str) -> torch.Tensor:
        """Images [B, C, H, W] from a batch that holds [B, H, W, C] or [B, H, W] under `key`."""
        x = batch[key]
        x = x[..., None] if x.ndim == 3 else x
        return x.permute(0, 3, 1, 2).float()

    # ---- averaged weights ----------------------------------------------------------------------------------

    def _averaged(self) -> nn.ModuleDict:
        """What the average is taken of: the autoencoder without its loss."""
        names = ("encoder", "decoder", "quant_conv", "post_quant_conv")
        return nn.ModuleDict({name: getattr(self, name) for name in names})

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
        return SampleRandom(self.seed, self.batches_seen, self.global_rank * batch_size, batch_size, self.device)

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        x = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(x, random=self.step_random(len(x)))
        self.batches_seen += 1
        if self.automatic_optimization:
            loss, logs = self.loss(x, reconstructions, posterior, 0, self.global_step)
        else:
            loss, logs = self._adversarial_step(x, reconstructions, posterior, batch_idx)
        self.log_dict(logs, batch_size=len(x))
        return loss

    def _adversarial_step(
        self,
        x: torch.Tensor,
        reconstructions: torch.Tensor,
        posterior: DiagonalGaussianDistribution,
        batch_idx: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step of the autoencoder and, from `disc_start` on, one of the discriminator."""
        step, last_layer = self.global_step, self.get_last_layer()
        generator, discriminator = self.optimizers()
        active = [generator, discriminator] if self.loss.discriminator_active(step) else [generator]
        losses, logs = [], {}
        for index, optimizer in enumerate(active):
            self.toggle_optimizer(optimizer)
            loss, of_one = self.loss(x, reconstructions, posterior, index, step, last_layer=last_layer)
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

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.use_ema:
            self.model_ema(self._averaged())

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.batches_seen = checkpoint.get("batches_seen", 0)

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x = self.get_input(batch, self.image_key)
        random = SampleRandom(self.seed, -1 - batch_idx, self.global_rank * len(x), len(x), self.device)
        with self.ema_scope():
            reconstructions, posterior = self(x, random=random)
        for index in range(1 if self.automatic_optimization else 2):
            _, logs = self.loss(x, reconstructions, posterior, index, self.global_step, split="val")
            self.log_dict(logs, batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if isinstance(self.loss, nn.Identity):
            raise UserError("yaml: lossconfig: torch.nn.Identity is no loss to train an autoencoder with")
        judge = [] if self.automatic_optimization else list(self.loss.discriminator.parameters())
        excluded = {id(parameter) for parameter in judge}
        autoencoder = [p for p in self.parameters() if p.requires_grad and id(p) not in excluded]
        optimizers = [
            torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.5, 0.9))
            for parameters in (autoencoder, judge)
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
        """Pictures in [-1, 1] for the log: inputs, their reconstructions, decoded draws from the prior."""
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        logs = {"inputs": x}
        if not only_inputs:
            with self.ema_scope():
                logs["reconstructions"], posterior = self(x, sample_posterior=False)
                logs["samples"] = self.decode(torch.randn_like(posterior.mode()))
        return {name: self.to_rgb(images) for name, images in logs.items()} if x.shape[1] > 3 else logs

    def to_rgb(self, x: torch.Tensor) -> torch.Tensor:
        """Random but constant colours [B, 3, H, W] in [-1, 1] for the channels of `x` [B, C, H, W]."""
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1, device=x.device))
        x = F.conv2d(x, self.colorize.to(x))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0


class IdentityFirstStage(nn.Module):
    """No autoencoder: latents are the images themselves, for diffusion on pixels."""

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    def decode(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    def quantize(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x
