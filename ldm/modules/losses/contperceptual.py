"""The loss of an autoencoder with continuous latents: reconstruction, KL, LPIPS and a patch discriminator."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
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


class LPIPSWithDiscriminator(nn.Module):
    """Loss of AutoencoderKL and discriminator (Esser et al., 2021, eq. 5-7; Rombach et al., 2022, eq. 25).

    Sums over the pixels and channels of a picture, means over the batch. What has no weight is not built:
    LPIPS at perceptual_weight 0, the discriminator at disc_factor 0.

    Args:
        disc_start: the first step with the adversarial term. disc_factor, disc_weight: its weight, times the
            ratio of the two gradients at the decoder's last layer. disc_loss: hinge or vanilla.
        disc_conditional: the discriminator also sees a condition, beside the picture's disc_in_channels.
        logvar_init: log variance of the reconstruction's likelihood; learn_logvar: trained along.
        kl_weight, pixelloss_weight, perceptual_weight: of the other terms.
        lpips_ckpt: file or files with LPIPS' weights; without them the perceptual term is off, which is said.

    Raises:
        UserError: disc_loss is unknown, or lpips_ckpt lacks weights.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        lpips_ckpt: str | os.PathLike[str] | Sequence[str] | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise UserError(f"yaml: disc_loss: '{disc_loss}' is none of {', '.join(DISCRIMINATOR_LOSSES)}")
        self.kl_weight, self.pixel_weight = kl_weight, pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.discriminator_iter_start, self.disc_conditional = disc_start, disc_conditional
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)), requires_grad=learn_logvar)
        self.perceptual_loss = self.discriminator = None
        if perceptual_weight > 0 and lpips_ckpt is None:
            print("The autoencoder's perceptual term (LPIPS) is off: lpips_ckpt names no weights.")
        elif perceptual_weight > 0:
            self.perceptual_loss = LPIPS.from_files(lpips_ckpt)
        if disc_factor > 0:
            from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

            self.discriminator = NLayerDiscriminator(disc_in_channels, 64, disc_num_layers, use_actnorm)
            self.discriminator.apply(weights_init)

    def discriminator_active(self, global_step: int) -> bool:
        """Whether there is an adversarial term at that step."""
        return self.discriminator is not None and global_step >= self.discriminator_iter_start

    def forward(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: torch.Tensor | None = None,
        cond: torch.Tensor | None = None,
        split: str = "train",
        weights: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The autoencoder's loss (optimizer_idx 0) or the discriminator's (1), and what to log.

        Args:
            inputs, reconstructions: pictures [B, C, H, W] in [-1, 1]. weights: of their places.
            last_layer: the decoder's last weight, for the adversarial term. cond: [B, C', H, W] with
                disc_conditional.
        """
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)
        batch_size = len(inputs)
        reconstruction = self.pixel_weight * (inputs - reconstructions).abs()
        if self.perceptual_loss is not None:
            perceptual = self.perceptual_loss(inputs, reconstructions)
            reconstruction = reconstruction + self.perceptual_weight * perceptual
        likelihood = reconstruction / torch.exp(self.logvar) + self.logvar
        nll = likelihood.sum() / batch_size
        weighted = nll if weights is None else (weights * likelihood).sum() / batch_size
        kl = posteriors.kl().sum() / batch_size
        loss = weighted + self.kl_weight * kl
        logs = {"logvar": self.logvar, "kl_loss": kl, "nll_loss": nll, "rec_loss": reconstruction.mean()}
        if self.discriminator_active(global_step):
            adversarial = -self._logits(reconstructions, cond).mean()
            weight = self.adaptive_weight(nll, adversarial, last_layer)
            loss = loss + weight * self.disc_factor * adversarial
            logs |= {"d_weight": weight, "g_loss": adversarial}
        logs["total_loss"] = loss
        return loss, {f"{split}/{name}": value.detach() for name, value in logs.items()}

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
        real = self._logits(inputs.detach(), cond)
        fake = self._logits(reconstructions.detach(), cond)
        loss = factor * self.disc_loss(real, fake)
        logs = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {f"{split}/{name}": value.detach() for name, value in logs.items()}

    def adaptive_weight(self, nll: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
        """disc_weight times the ratio of both gradients' norms at the last layer (Esser et al., 2021, eq. 7).

        Zero where there are no gradients, in validation.
        """
        if not torch.is_grad_enabled():
            return torch.zeros((), device=nll.device)
        nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
        adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
        ratio = nll_grad.norm() / (adversarial_grad.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.discriminator_weight

    def _logits(self, images: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """What the discriminator says of each patch: positive is real."""
        if self.disc_conditional:
            images = torch.cat([images, cond], dim=1)
        return self.discriminator(images.contiguous())
