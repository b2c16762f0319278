"""The loss of an autoencoder with a codebook: reconstruction, commitment, LPIPS and a patch discriminator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.modules.losses.adversarial import AdversarialLoss, for_the_log

PIXEL_LOSSES = ("l1", "l2")


def measure_perplexity(indices: torch.Tensor, n_embed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How evenly a codebook of `n_embed` is used, as exp(entropy), and how many entries are used at all."""
    share = torch.bincount(indices.flatten(), minlength=n_embed) / indices.numel()
    return torch.exp(torch.special.entr(share).sum()), (share > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Loss of VQModel and discriminator (Esser et al., 2021, eq. 4-7): means over everything.

    Args beyond AdversarialLoss':
        codebook_weight, pixelloss_weight: of the quantiser's and the pixels' terms. pixel_loss: l1 or l2.
        n_classes: entries of the codebook; when given, how evenly they are used is logged.
        perceptual_loss: lpips, the only one.

    Raises:
        UserError: a name is unknown, or lpips_ckpt lacks weights.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        *,
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        **adversarial: Any,
    ) -> None:
        if perceptual_loss != "lpips":
            raise UserError(f"yaml: perceptual_loss: '{perceptual_loss}' is not lpips, the only one")
        if pixel_loss not in PIXEL_LOSSES:
            raise UserError(f"yaml: pixel_loss: '{pixel_loss}' is none of {', '.join(PIXEL_LOSSES)}")
        super().__init__(disc_start, **adversarial)
        self.codebook_weight, self.pixel_weight = codebook_weight, pixelloss_weight
        self.pixel_loss, self.n_classes = pixel_loss, n_classes

    def forward(
        self,
        codebook_loss: torch.Tensor,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: torch.Tensor | None = None,
        cond: torch.Tensor | None = None,
        split: str = "train",
        predicted_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The autoencoder's loss (optimizer_idx 0) or the discriminator's (1), and what to log.

        Args:
            codebook_loss: the quantiser's. inputs, reconstructions: pictures [B, C, H, W] in [-1, 1].
            last_layer: the decoder's last weight, for the adversarial term. cond: [B, C', H, W] with
                disc_conditional. predicted_indices: the codebook's entries that were chosen.
        """
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)
        pixel = F.l1_loss if self.pixel_loss == "l1" else F.mse_loss
        reconstruction = self.pixel_weight * pixel(reconstructions, inputs, reduction="none")
        reconstruction, perceptual = self.add_perceptual(reconstruction, inputs, reconstructions)
        nll = reconstruction.mean()
        loss = nll + self.codebook_weight * codebook_loss.mean()
        logs = {"quant_loss": codebook_loss.mean(), "nll_loss": nll, "rec_loss": nll}
        if perceptual is not None:
            logs["p_loss"] = perceptual.mean()
        if self.discriminator_active(global_step):
            loss, of_the_judge = self.add_adversarial(loss, nll, reconstructions, last_layer, cond)
            logs |= of_the_judge
        if predicted_indices is not None and self.n_classes is not None:
            perplexity, used = measure_perplexity(predicted_indices, self.n_classes)
            logs |= {"perplexity": perplexity, "cluster_usage": used.float()}
        return loss, for_the_log({**logs, "total_loss": loss}, split)
