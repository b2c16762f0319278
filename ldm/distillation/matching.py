"""Distribution matching (Yin et al., 2024): samples are moved to where the teacher finds them likelier."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def matching_gradient(output: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """In which direction samples [B, ...] are less likely, for the teacher, than for the student.

    (score_fake - score_real) sqrt(1 - abar) / sqrt(abar), with scores in units of the noise, is fake - real in x_0;
    each sample's is divided by the mean of |output - real| (Yin et al., 2024, eq. 7 and 8).

    Args:
        output: the samples. real, fake: x_0 as the guided teacher and the student see it in the noised samples.
    """
    distance = (output - real).abs().flatten(1).mean(1)
    return (fake - real) / distance.clamp(min=1e-6).view(-1, *([1] * (output.ndim - 1)))


def matching_loss(output: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient by `output` is `matching_gradient`, divided by the number of entries."""
    gradient = matching_gradient(output, real, fake).detach()
    return 0.5 * F.mse_loss(output, (output - gradient).detach())
