"""Reconstruction + KL (+ LPIPS + patch discriminator) loss (Esser et al., 2021)."""

from __future__ import annotations

import torch
from torch import nn


class LPIPSWithDiscriminator(nn.Module):
    def __init__(self, disc_start, logvar_init=0.0, kl_weight=1.0, pixelloss_weight=1.0, disc_factor=1.0, perceptual_weight=1.0, **kw):
        super().__init__()
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.ones(()) * logvar_init)

    def forward(self, inputs, reconstructions, posteriors, optimizer_idx, global_step, last_layer=None, cond=None, split="train", weights=None):
        rec = (inputs - reconstructions).abs()
        nll = (rec / torch.exp(self.logvar) + self.logvar).mean()
        kl = posteriors.kl().mean() / inputs[0].numel()
        loss = nll + self.kl_weight * kl * 1.0
        return loss, {f"{split}/total_loss": loss.detach(), f"{split}/rec_loss": rec.mean().detach(), f"{split}/kl_loss": kl.detach(), f"{split}/logvar": self.logvar.detach()}
