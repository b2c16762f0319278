"""Augmentation of training images that the network is told of, so that it does not leak into samples.

Karras et al. (2022, appendix F.2), after Karras et al. (2020, "Training GANs with limited data"): flips, scaling,
rotation, stretching and translation are drawn at random, and the numbers drawn are an input of the network. Where they
are zero it has learned images as they are, and that is what sampling asks for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.modules.randomness import Randomness

CONDITIONS = 9  # numbers that say what was done to an image


class Augmentation:
    """Draws what is done to images, and does it.

    Args:
        probability: of each operation; mirroring always happens to half of the images. 0 does nothing at all.
        scale: factor of one standard deviation of scaling. stretch: the same of one direction against the other.
        shift: one standard deviation of translation, as a share of the image's side.

    Raises:
        UserError: the probability is none.
    """

    def __init__(
        self, probability: float = 0.12, scale: float = 2**0.2, stretch: float = 2**0.2, shift: float = 1 / 8
    ) -> None:
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise UserError(f"yaml: augment_prob is {probability!r}; it must lie between 0 and 1")
        self.probability, self.scale, self.stretch, self.shift = probability, scale, stretch, shift

    def __call__(self, images: torch.Tensor, random: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented images [B, C, H, W], and what was done to each, [B, 9]."""
        if not self.probability:
            return images, images.new_zeros(len(images), CONDITIONS)
        matrix, condition = self.draw(images, random)
        return warp(images, matrix), condition

    def draw(self, images: torch.Tensor, random: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """A transformation [B, 3, 3] of each of the images [B, C, H, W], and the numbers [B, 9] that describe it.

        Coordinates are (x, y, 1) in pixels from the image's middle, y downwards.
        """
        do = torch.stack([random.rand() for _ in range(5)]) < self.probability
        turns = (2 * torch.stack([random.rand(), random.rand()]) - 1) * math.pi
        mirrored, upside_down = (random.randint(2).float() for _ in range(2))
        size, stretch, x, y = random.randn_like(images.new_empty(len(images), 4, dtype=torch.float32)).T
        upside_down = upside_down * do[0]
        size, turn = size * do[1], turns[0] * do[2]
        axis, stretch = turns[1] * do[3], stretch * do[3]
        x, y = x * do[4], y * do[4]
        height, width = images.shape[2:]
        steps = (
            scaling(1 - 2 * mirrored, 1 - 2 * upside_down),
            scaling(self.scale**size, self.scale**size),
            rotation(-turn),
            rotation(axis),
            scaling(self.stretch**stretch, self.stretch**-stretch),
            rotation(-axis),
            translation(self.shift * width * x, self.shift * height * y),
        )
        matrix = steps[0]
        for step in steps[1:]:
            matrix = matrix @ step
        told = (mirrored, upside_down, size, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(),
                x, y)  # fmt: skip
        return matrix, torch.stack(told, dim=1).to(images)


def matrices(rows: list[list[torch.Tensor | float]]) -> torch.Tensor:
    """[B, 3, 3] from two rows of three entries, each a number or [B]."""
    like = next(entry for row in rows for entry in row if isinstance(entry, torch.Tensor))
    filled = [[torch.zeros_like(like) + entry for entry in row] for row in [*rows, [0.0, 0.0, 1.0]]]
    return torch.stack([torch.stack(row, dim=-1) for row in filled], dim=-2)


def translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return matrices([[1.0, 0.0, x], [0.0, 1.0, y]])


def scaling(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return matrices([[x, 0.0, 0.0], [0.0, y, 0.0]])


def rotation(angle: torch.Tensor) -> torch.Tensor:
    return matrices([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])


def warp(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] transformed by `matrix` [B, 3, 3], mirrored at their edges, by cubic interpolation."""
    height, width = images.shape[2:]
    half = matrix.new_tensor([width / 2, height / 2, 1.0])
    relative = (torch.linalg.inv(matrix) * half / half[:, None])[:, :2]  # of coordinates in [-1, 1]
    grid = F.affine_grid(relative.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


class AugmentWrapper(nn.Module):
    """A network that is told of augmentation as the first of what it maps; without it, that there was none.

    State-dict keys are upstream's.
    """

    def __init__(self, inner_model: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        aug_cond: torch.Tensor | None = None,
        mapping_cond: torch.Tensor | None = None,
        **conditions: Any,
    ) -> Any:
        """The network's output, for aug_cond [B, 9] and what else it maps, mapping_cond [B, D]."""
        told = x.new_zeros(len(x), CONDITIONS) if aug_cond is None else aug_cond
        told = told if mapping_cond is None else torch.cat([told, mapping_cond], dim=1)
        return self.inner_model(x, sigma, mapping_cond=told, **conditions)
