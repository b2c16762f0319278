"""Autoencoders as Lightning modules: the first stage of latent diffusion (Rombach et al., 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


class AutoencoderKL(pl.LightningModule):
    """Images [B, 3, H, W] in [-1, 1] <-> a Gaussian over latents [B, embed_dim, H/f, W/f].

    Args:
        ddconfig: the encoder's and decoder's sizes. lossconfig: the training loss, `torch.nn.Identity` for none.
        embed_dim: channels of the latents. ckpt_path: weights to begin with.
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
    ) -> None:
        super().__init__()
        self.image_key, self.monitor, self.learning_rate = image_key, monitor, learning_rate
        self.scheduler_config = scheduler_config
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig) if lossconfig is not None else nn.Identity()
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.embed_dim = embed_dim
        if ckpt_path is not None:
            from ldm.checkpoint import load_into

            load_into(self, ckpt_path, ignore_keys=ignore_keys)

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior of images [B, 3, H, W] in [-1, 1]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of about [-1, 1] from latents [B, embed_dim, H/f, W/f]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: torch.Tensor, sample_posterior: bool = True
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Reconstructions and posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def get_input(self, batch: dict, key: str) -> torch.Tensor:
        """Images [B, C, H, W] from a batch that holds [B, H, W, C] (or [B, H, W]) under `key`."""
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        x = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(x)
        loss, logs = self.loss(x, reconstructions, posterior, 0, self.global_step, last_layer=None, split="train")
        self.log_dict(logs, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=(0.5, 0.9))
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    @torch.no_grad()
    def log_images(self, batch: dict, N: int = 8, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Inputs, reconstructions and decoded draws from the prior."""
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        reconstructions, posterior = self(x, sample_posterior=False)
        return {"inputs": x, "reconstructions": reconstructions}


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
