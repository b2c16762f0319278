"""Autoencoders with a codebook (Esser et al., 2021): VQGAN, and what latent diffusion sees of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.autoencoder_base import Autoencoder
from ldm.modules.quantize import VectorQuantizer
from ldm.modules.randomness import Randomness
from ldm.util import UserError

# The original's yaml names taming-transformers' loss, which downloads weights as soon as it is built.
OUR_LOSSES = {
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.DummyLoss": "ldm.modules.losses.contperceptual.DummyLoss",
}


class VQModel(Autoencoder):
    """Images [B, 3, H, W] in [-1, 1] <-> a codebook's entries at the places of [B, embed_dim, H/f, W/f].

    Args beyond Autoencoder's:
        n_embed, embed_dim: entries of the codebook, and their length.
        ckpt_path: weights to begin with, without keys that begin with one of `ignore_keys`.
        batch_resize_range: (least, most) pixels: train on batches resized to a random multiple of 16 between.
        remap, sane_index_shape: see VectorQuantizer.
        use_ema: keep an average of the weights. ema_decay: of that average.
        decoder_only: train the decoder alone; latents stay as they are, and so do the models built on them.

    Raises:
        UserError: ddconfig does not describe this autoencoder, or `remap` cannot be read.
    """

    PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
    ENCODING = ("encoder", "quantize", "quant_conv")

    def __init__(
        self,
        ddconfig: Any,
        lossconfig: Any,
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        batch_resize_range: Sequence[int] | None = None,
        remap: str | os.PathLike[str] | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        decoder_only: bool = False,
        **settings: Any,
    ) -> None:
        if ddconfig.get("double_z", True):
            raise UserError("yaml: ddconfig.double_z: VQModel needs false: a codebook has no variance")
        super().__init__(ddconfig, _own_loss(lossconfig), **settings)
        self.embed_dim, self.n_embed = embed_dim, n_embed
        self.batch_resize_range = batch_resize_range
        self.quantize = VectorQuantizer(n_embed, embed_dim, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.complete(ckpt_path, ignore_keys, use_ema, ema_decay, decoder_only)

    # ---- images and latents --------------------------------------------------------------------------------

    def encode_to_prequant(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [B, embed_dim, H/f, W/f] before the codebook."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: torch.Tensor) -> Any:
        """Quantised latents [B, embed_dim, H/f, W/f], the codebook's loss, (None, None, indices)."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of about [-1, 1] from quantised latents."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code: torch.Tensor) -> torch.Tensor:
        """Images from the numbers of codebook entries [B, H/f, W/f]."""
        return self.decode(self.quantize.get_codebook_entry(code, (*code.shape, self.embed_dim)))

    def forward(
        self, x: torch.Tensor, return_pred_indices: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstructions, the codebook's loss, and with `return_pred_indices` the chosen entries."""
        quant, codebook_loss, (_, _, indices) = VQModel.encode(self, x)
        reconstructions = VQModel.decode(self, quant)
        return (reconstructions, codebook_loss, indices) if return_pred_indices else (reconstructions, codebook_loss)

    # ---- training ------------------------------------------------------------------------------------------

    def training_input(self, batch: dict, random: Randomness) -> torch.Tensor:
        """Images, resized at random as `batch_resize_range` says; the first batches at the largest size."""
        x = self.get_input(batch, self.image_key)
        if self.batch_resize_range is None:
            return x
        least, most = self.batch_resize_range
        sizes = range(least, most + 16, 16)
        size = most if self.global_step <= 4 else sizes[int(random.randint(len(sizes))[0])]
        return x if size == x.shape[2] else F.interpolate(x, size=(size, size), mode="bicubic")

    def reconstruct(self, x: torch.Tensor, random: Randomness) -> tuple[torch.Tensor, Any]:
        reconstructions, codebook_loss, indices = self(x, return_pred_indices=True)
        return reconstructions, (codebook_loss, indices)

    def losses(
        self, x: torch.Tensor, reconstructions: torch.Tensor, latents: Any, index: int, **others: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        codebook_loss, indices = latents
        return self.loss(
            codebook_loss, x, reconstructions, index, self.global_step, predicted_indices=indices, **others
        )

    def pictures(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructions."""
        return {"reconstructions": self(x)[0]}


class VQModelInterface(VQModel):
    """VQModel as latent diffusion uses it: latents before the codebook, which belongs to the decoder."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [B, embed_dim, H/f, W/f], not quantised."""
        return self.encode_to_prequant(x)

    def decode(self, h: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
        """Images [B, 3, H, W] of about [-1, 1] from latents, quantised here unless told otherwise."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


def _own_loss(config: Any) -> Any:
    """A lossconfig with our loss in place of taming-transformers'."""
    if config is None:
        return None
    return {**config, "target": OUR_LOSSES.get(config.get("target"), config.get("target"))}
