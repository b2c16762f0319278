"""The image U-Net of k-diffusion (`image_v1`); state-dict keys and shapes are upstream's.

Of Karras et al. (2022): noise levels through Fourier features and a mapping network. Of Luhman and Luhman (2022,
"Improving Diffusion Model Efficiency Through Patching"): it may work on patches of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.k_diffusion.models.layers import (
    AdaGN,
    Condition,
    ConditionedSequential,
    CrossAttention2d,
    Downsample2d,
    FourierFeatures,
    ResConvBlock,
    SelfAttention2d,
    UNet,
    Upsample2d,
    orthogonal,
    zero,
)

GROUP_SIZE, HEAD_SIZE = 32, 64  # channels


class Level(ConditionedSequential):
    """The way down or up of one level: residual blocks, each with its attention, and resampling before or after.

    Args:
        depth: residual blocks. c_in, c_mid, c_out: channels before, between and after them.
        self_attention: whether pixels attend to each other. cross_features: of tokens that they attend to; 0 for none.
        before, after: what is done first and last.
    """

    def __init__(
        self,
        depth: int,
        mapped_features: int,
        c_in: int,
        c_mid: int,
        c_out: int,
        self_attention: bool,
        cross_features: int,
        dropout: float,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        layers: list[nn.Module] = [] if before is None else [before]
        for i in range(depth):
            c, out = c_in if i == 0 else c_mid, c_mid if i < depth - 1 else c_out
            layers.append(ResConvBlock(mapped_features, c, c_mid, out, GROUP_SIZE, dropout))
            heads, groups = max(1, out // HEAD_SIZE), max(1, out // GROUP_SIZE)
            if self_attention:
                layers.append(SelfAttention2d(out, heads, AdaGN(mapped_features, out, groups), dropout))
            if cross_features:
                norm = AdaGN(mapped_features, out, groups)
                layers.append(CrossAttention2d(out, cross_features, heads, norm, dropout))
        super().__init__(*layers, *([] if after is None else [after]))


class MappingNet(nn.Sequential):
    """[B, features] -> [B, features], by two layers."""

    def __init__(self, features: int) -> None:
        super().__init__(*[layer for _ in range(2) for layer in (orthogonal(nn.Linear(features, features)), nn.GELU())])


class ImageDenoiserModelV1(nn.Module):
    """Scaled noisy images [B, C, H, W] and noise levels sigma [B] -> what `Denoiser` makes clean images of.

    Args:
        c_in: channels of the images. feats_in: features of the mapping network.
        depths: residual blocks of each level, outermost first; each level halves the size of the one before.
        channels: of each level.
        self_attn_depths, cross_attn_depths: whether each level has self-attention, and cross-attention.
        mapping_cond_dim: numbers a sample that are mapped beside the noise level, such as augmentation's 9.
        unet_cond_dim: channels that are laid beside the noisy image.
        cross_cond_dim: features of the tokens of cross-attention; 0 for no cross-attention.
        dropout_rate: of residual branches' channels, and of attention.
        patch_size: pixels a side of the patches that the U-Net works on.
        skip_stages: outermost levels that are there but unused, until the network is grown.
        has_variance: it also gives the logarithm of its error's variance, one number a sample.
        use_checkpoint: recompute a level's activations in the backward pass instead of keeping them.

    Attributes:
        reduction: pixels a side that the innermost level sees as one.

    Raises:
        UserError: the lists are of different lengths, or numbers do not go together.
    """

    def __init__(
        self,
        c_in: int,
        feats_in: int,
        depths: Sequence[int],
        channels: Sequence[int],
        self_attn_depths: Sequence[bool],
        cross_attn_depths: Sequence[bool] | None = None,
        mapping_cond_dim: int = 0,
        unet_cond_dim: int = 0,
        cross_cond_dim: int = 0,
        dropout_rate: float = 0.0,
        patch_size: int = 1,
        skip_stages: int = 0,
        has_variance: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        levels = range(len(depths))
        crossed = cross_attn_depths if cross_cond_dim and cross_attn_depths is not None else [False] * len(depths)
        check_levels(depths, channels, self_attn_depths, crossed, feats_in, skip_stages)
        if patch_size < 1:
            raise UserError(f"yaml: unet_config: patch_size is {patch_size}; it must be at least 1")
        self.reduction = patch_size * 2 ** (len(depths) - 1 - skip_stages)
        self.c_in, self.patch_size, self.has_variance = c_in, patch_size, has_variance
        self.use_checkpoint = use_checkpoint
        self.timestep_embed = FourierFeatures(1, feats_in)
        if mapping_cond_dim:
            self.mapping_cond = nn.Linear(mapping_cond_dim, feats_in, bias=False)
        self.mapping = MappingNet(feats_in)
        outer = [channels[max(0, i - 1)] for i in levels]  # channels outside of each level
        pixels = patch_size**2
        self.proj_in = nn.Conv2d((c_in + unet_cond_dim) * pixels, outer[skip_stages], 1)
        self.proj_out = zero(nn.Conv2d(outer[skip_stages], c_in * pixels + has_variance, 1))
        down, up = [], []
        for i in levels:
            kind = (bool(self_attn_depths[i]), cross_cond_dim if crossed[i] else 0, dropout_rate)
            first, last = (Downsample2d(), Upsample2d()) if i > skip_stages else (nn.Identity(), nn.Identity())
            twice = channels[i] * (1 if i == levels[-1] else 2)
            down.append(Level(depths[i], feats_in, outer[i], channels[i], channels[i], *kind, before=first))
            up.append(Level(depths[i], feats_in, twice, channels[i], outer[i], *kind, after=last))
        self.u_net = UNet(down, up[::-1], skip_stages)
        used = self.u_net.used()
        for block in (*down, *up):
            block.requires_grad_(block in used)  # processes that train together must know what no gradient reaches

    def param_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trained parameters that weights decay for (the U-Net's and the mapping's weights), and the others."""
        decayed, others = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decays = name.startswith(("mapping", "u_net")) and name.endswith(".weight")
                (decayed if decays else others).append(parameter)
        return decayed, others

    def _run(self, block: nn.Module, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, condition, use_reentrant=False)
        return block(x, condition)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        mapping_cond: torch.Tensor | None = None,
        unet_cond: torch.Tensor | None = None,
        cross_cond: torch.Tensor | None = None,
        cross_cond_padding: torch.Tensor | None = None,
        return_variance: bool = False,
    ) -> Any:
        """The output [B, C, H, W]; with `return_variance` also the error's log variance [B].

        Args:
            mapping_cond: [B, mapping_cond_dim]. unet_cond: [B, unet_cond_dim, H, W].
            cross_cond: tokens [B, T, cross_cond_dim]. cross_cond_padding: [B, T], true where they are padding.
        """
        embedded = self.timestep_embed(sigma.log()[:, None] / 4)
        if mapping_cond is not None:
            embedded = embedded + self.mapping_cond(mapping_cond)
        condition = Condition(self.mapping(embedded), cross_cond, cross_cond_padding)
        x = x if unet_cond is None else torch.cat([x, unet_cond], dim=1)
        x = self.proj_in(F.pixel_unshuffle(x, self.patch_size))
        x = self.proj_out(self.u_net(x, condition, self._run))
        if self.has_variance:
            x, logvar = x[:, :-1], x[:, -1].flatten(1).mean(1)
        x = F.pixel_shuffle(x, self.patch_size)
        return (x, logvar) if self.has_variance and return_variance else x


def check_levels(
    depths: Sequence[int],
    channels: Sequence[int],
    self_attention: Sequence[bool],
    cross_attention: Sequence[bool],
    features: int,
    skip_stages: int,
) -> None:
    """Raise UserError where what a yaml says of the levels does not go together."""
    lists = {"depths": depths, "channels": channels, "self_attn_depths": self_attention,
             "cross_attn_depths": cross_attention}  # fmt: skip
    sizes = ", ".join(f"{name} has {len(value)}" for name, value in lists.items())
    if len({len(value) for value in lists.values()}) > 1 or not depths:
        raise UserError(f"yaml: unet_config: one entry a level is needed in each list; {sizes}")
    if features % 2:
        raise UserError(f"yaml: unet_config: feats_in (mapping_out) is {features}; it must be even")
    if not 0 <= skip_stages < len(depths):
        raise UserError(f"yaml: unet_config: skip_stages is {skip_stages}; there are {len(depths)} levels")
    for value, attends in zip(channels, map(any, zip(self_attention, cross_attention, strict=True)), strict=True):
        grouped = all(width % max(1, width // GROUP_SIZE) == 0 for width in (value, 2 * value))
        if not grouped or (attends and value % max(1, value // HEAD_SIZE)):
            raise UserError(
                f"yaml: unet_config: channels has {value}, which cannot be divided into groups of {GROUP_SIZE} (and, "
                f"with attention, heads of {HEAD_SIZE})"
            )
