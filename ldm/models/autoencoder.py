"""Autoencoders: the first stage of latent diffusion (Rombach et al., 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.models.autoencoder_base import Autoencoder
from ldm.models.vq import VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.randomness import Randomness
from ldm.util import UserError

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface"]


class AutoencoderKL(Autoencoder):
    """Images [B, 3, H, W] in [-1, 1] <-> a Gaussian over latents [B, embed_dim, H/f, W/f].

    Args beyond Autoencoder's:
        embed_dim: channels of the latents.
        ckpt_path: weights to begin with, without keys that begin with one of `ignore_keys`.
        use_ema: keep an average of the weights. ema_decay: of that average.
        decoder_only: train the decoder alone; latents stay as they are, and so do the models built on them.

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
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        decoder_only: bool = False,
        **settings: Any,
    ) -> None:
        if not ddconfig.get("double_z", True):
            raise UserError("yaml: ddconfig.double_z: AutoencoderKL needs true, for a mean and a variance")
        super().__init__(ddconfig, lossconfig, **settings)
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.complete(ckpt_path, ignore_keys, use_ema, ema_decay, decoder_only)

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

    def reconstruct(self, x: torch.Tensor, random: Randomness) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        return self(x, random=random)

    def losses(
        self, x: torch.Tensor, reconstructions: torch.Tensor, latents: Any, index: int, **others: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.loss(x, reconstructions, latents, index, self.global_step, **others)

    def pictures(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructions, and decoded draws from the prior."""
        reconstructions, posterior = self(x, sample_posterior=False)
        samples = self.decode(torch.randn_like(posterior.mode()))
        return {"reconstructions": reconstructions, "samples": samples}


class IdentityFirstStage(nn.Module):
    """No autoencoder: latents are the images themselves, for diffusion on pixels.

    Args:
        vq_interface: `quantize` answers as a VQModel's does.
    """

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
