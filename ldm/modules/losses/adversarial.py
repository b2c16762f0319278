"""What the losses of autoencoders share: LPIPS, a patch discriminator, and the balance between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.modules.losses.lpips import LPIPS


def hinge_d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss (Lim & Ye, 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's cross entropy (Goodfellow et al., 2014, eq. 1)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "hinge": hinge_d_loss,
    "vanilla": vanilla_d_loss,
}


class AdversarialLoss(nn.Module):
    """A perceptual and an adversarial term, for a loss to add to its own (Esser et al., 2021, eq. 6-7).

    What has no weight is not built: LPIPS at perceptual_weight 0, the discriminator at disc_factor 0.

    Args:
        disc_start: the first step with the adversarial term. disc_factor, disc_weight: its weight, times the
            ratio of the two gradients at the decoder's last layer. disc_loss: hinge or vanilla.
        disc_conditional: the discriminator also sees a condition, beside the picture. disc_in_channels: of both.
        disc_num_layers, disc_ndf, use_actnorm: the discriminator's depth, width and normalisation.
        perceptual_weight: of LPIPS.
        lpips_ckpt: file or files with LPIPS' weights; without them the perceptual term is off, which is said.

    Raises:
        UserError: disc_loss is unknown, or lpips_ckpt lacks weights.
    """

    def __init__(
        self,
        disc_start: int,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        lpips_ckpt: str | os.PathLike[str] | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise UserError(f"yaml: disc_loss: '{disc_loss}' is none of {', '.join(DISCRIMINATOR_LOSSES)}")
        self.perceptual_weight = perceptual_weight
        self.discriminator_iter_start, self.disc_conditional = disc_start, disc_conditional
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.perceptual_loss = self.discriminator = None
        if perceptual_weight > 0 and lpips_ckpt is None:
            print("The autoencoder's perceptual term (LPIPS) is off: lpips_ckpt names no weights.")
        elif perceptual_weight > 0:
            self.perceptual_loss = LPIPS.from_files(lpips_ckpt)
        if disc_factor > 0:
            from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            self.discriminator.apply(weights_init)

    def discriminator_active(self, global_step: int) -> bool:
        """Whether there is an adversarial term at that step."""
        return self.discriminator is not None and global_step >= self.discriminator_iter_start

    def add_perceptual(
        self, loss: torch.Tensor, inputs: torch.Tensor, reconstructions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`loss` [B, C, H, W] with LPIPS added at every place, and LPIPS itself [B, 1, 1, 1] where it is on."""
        if self.perceptual_loss is None:
            return loss, None
        perceptual = self.perceptual_loss(inputs, reconstructions)
        return loss + self.perceptual_weight * perceptual, perceptual

    def add_adversarial(
        self,
        loss: torch.Tensor,
        nll: torch.Tensor,
        reconstructions: torch.Tensor,
        last_layer: torch.Tensor | None,
        cond: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The autoencoder's scalar `loss` with the adversarial term, balanced against `nll`, and what to log."""
        adversarial = -self.logits(reconstructions, cond).mean()
        weight = self.adaptive_weight(nll, adversarial, last_layer)
        return loss + weight * self.disc_factor * adversarial, {"d_weight": weight, "g_loss": adversarial}

    def adaptive_weight(
        self, nll: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor | None
    ) -> torch.Tensor:
        """disc_weight times the ratio of both gradients' norms at the last layer (Esser et al., 2021, eq. 7).

        Zero where there are no gradients, in validation.
        """
        if not torch.is_grad_enabled():
            return torch.zeros((), device=nll.device)
        nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
        adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
        ratio = nll_grad.norm() / (adversarial_grad.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.discriminator_weight

    def discriminator_loss(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        global_step: int,
        cond: torch.Tensor | None = None,
        split: str = "train",
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """How badly the discriminator tells pictures from reconstructions, and what to log."""
        factor = self.disc_factor if self.discriminator_active(global_step) else 0.0
        real = self.logits(inputs.detach(), cond)
        fake = self.logits(reconstructions.detach(), cond)
        loss = factor * self.disc_loss(real, fake)
        logs = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, for_the_log(logs, split)

    def logits(self, images: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """What the discriminator says of each patch: positive is real."""
        if self.disc_conditional:
            images = torch.cat([images, cond], dim=1)
        return self.discriminator(images.contiguous())


def for_the_log(values: dict[str, torch.Tensor], split: str) -> dict[str, torch.Tensor]:
    """`values` under the names `train/...` or `val/...`, without gradients."""
    return {f"{split}/{name}": value.detach() for name, value in values.items()}
