"""The adversarial term: a small head tells the teacher's features of true latents from those of the student's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.losses.adversarial import hinge_d_loss, vanilla_d_loss


@dataclass(frozen=True)
class Form:
    """A form of adversarial training; logits are positive for what is held to be true.

    Args:
        generator: loss of the student, from the logits of its samples.
        discriminator: loss of the head, from those of true latents and of the student's.
    """

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


def _least_squares(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


FORMS = {
    # Mao et al., 2017, eq. 9
    "lsgan": Form(lambda fake: 0.5 * (fake - 1).square().mean(), _least_squares),
    # Arjovsky et al., 2017, algorithm 1
    "wgan": Form(lambda fake: -fake.mean(), lambda real, fake: fake.mean() - real.mean()),
    # Lim & Ye, 2017
    "hinge": Form(lambda fake: -fake.mean(), hinge_d_loss),
    # Goodfellow et al., 2014: log D(G) is raised, or as in eq. 1 log(1 - D(G)) is lowered
    "non-saturating": Form(lambda fake: F.softplus(-fake).mean(), vanilla_d_loss),
    "vanilla": Form(lambda fake: -F.softplus(fake).mean(), vanilla_d_loss),
}


class Discriminator(nn.Sequential):
    """Features [B, channels, h, w] -> logits [B, 1, h / 2, w / 2]."""

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.GroupNorm(32, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(32, width),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )


@contextmanager
def held_still(module: nn.Module) -> Iterator[None]:
    """Within the block what passes through `module` gives its parameters no gradient."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
