"""The loss of an autoencoder with continuous latents: reconstruction, KL, LPIPS and a patch discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, for_the_log, hinge_d_loss, vanilla_d_loss

__all__ = ["DummyLoss", "LPIPSWithDiscriminator", "hinge_d_loss", "vanilla_d_loss"]


class DummyLoss(nn.Identity):
    """No loss, for yaml files that only sample; the name that the original's inpainting model gives it."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """Loss of AutoencoderKL and discriminator (Esser et al., 2021, eq. 5-7; Rombach et al., 2022, eq. 25).

    Sums over the pixels and channels of a picture, means over the batch.

    Args beyond AdversarialLoss':
        logvar_init: log variance of the reconstruction's likelihood; learn_logvar: trained along.
        kl_weight, pixelloss_weight: of the other terms.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        *,
        learn_logvar: bool = False,
        **adversarial: Any,
    ) -> None:
        super().__init__(disc_start, **adversarial)
        self.kl_weight, self.pixel_weight = kl_weight, pixelloss_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)), requires_grad=learn_logvar)

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
        reconstruction, _ = self.add_perceptual(reconstruction, inputs, reconstructions)
        likelihood = reconstruction / torch.exp(self.logvar) + self.logvar
        nll = likelihood.sum() / batch_size
        weighted = nll if weights is None else (weights * likelihood).sum() / batch_size
        kl = posteriors.kl().sum() / batch_size
        loss = weighted + self.kl_weight * kl
        logs = {"logvar": self.logvar, "kl_loss": kl, "nll_loss": nll, "rec_loss": reconstruction.mean()}
        if self.discriminator_active(global_step):
            loss, of_the_judge = self.add_adversarial(loss, nll, reconstructions, last_layer, cond)
            logs |= of_the_judge
        return loss, for_the_log({**logs, "total_loss": loss}, split)
