"""The autoencoder's encoder and decoder (Esser et al., 2021; Rombach et al., 2022, appendix E)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.modules.tiling import attention


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Group normalisation as every block of the autoencoder uses it."""
    if in_channels % num_groups:
        raise UserError(f"yaml: ddconfig.num_groups: {num_groups} does not divide {in_channels} channels")
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6, affine=True)


def _silu(normed: torch.Tensor) -> torch.Tensor:
    """SiLU, in place of what a norm has just made, unless that is recorded: images are large here."""
    return F.silu(normed, inplace=not normed.requires_grad)


class Upsample(nn.Module):
    """Twice the height and width by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Half the height and width by a strided convolution (padded right and below) or by averaging."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip, [B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut_name = None
        if in_channels != out_channels:
            self.shortcut_name = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            kernel = 3 if conv_shortcut else 1
            shortcut = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
            setattr(self, self.shortcut_name, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = _silu(self.norm2(h))  # the convolution's result is not needed any more
        h = self.conv2(self.dropout(h))
        x = getattr(self, self.shortcut_name)(x) if self.shortcut_name else x
        return h + x if torch.is_grad_enabled() else h.add_(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the H * W places, with a skip."""

    def __init__(self, in_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.slice_size: int | None = None
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = attention(q, k, v, self.slice_size).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


ATTENTIONS = {
    "vanilla": AttnBlock,
    "vanilla-xformers": AttnBlock,  # the same layers; torch's attention needs no more memory than that library's
    "none": lambda in_channels, num_groups: nn.Identity(),
}


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a network are made: what they all have in common."""

    attn_type: str
    dropout: float
    num_groups: int

    def __post_init__(self) -> None:
        if self.attn_type not in ATTENTIONS:
            kinds = ", ".join(ATTENTIONS)
            raise UserError(f"yaml: ddconfig.attn_type: '{self.attn_type}' is none of {kinds}")

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(
            in_channels=in_channels,
            out_channels=out_channels,
            dropout=self.dropout,
            num_groups=self.num_groups,
        )

    def attention(self, channels: int) -> nn.Module:
        return ATTENTIONS[self.attn_type](channels, self.num_groups)

    def middle(self, channels: int) -> nn.Module:
        """The blocks at the smallest size."""
        middle = nn.Module()
        middle.block_1 = self.resnet(channels, channels)
        middle.attn_1 = self.attention(channels)
        middle.block_2 = self.resnet(channels, channels)
        return middle

    def level(self, in_channels: int, out_channels: int, count: int, attention: bool) -> nn.Module:
        """The blocks at one size, each followed by attention or none of them."""
        level = nn.Module()
        channels = [in_channels] + [out_channels] * count
        level.block = nn.ModuleList(self.resnet(*pair) for pair in zip(channels, channels[1:], strict=False))
        level.attn = nn.ModuleList(self.attention(out_channels) for _ in range(count if attention else 0))
        return level


def _run_middle(middle: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(h)))


def _layers_of(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers in their order: called one by one, what a layer read is gone before the next but one."""
    for level in levels:
        for i, block in enumerate(level.block):
            yield block
            if len(level.attn):
                yield level.attn[i]
        for resize in ("downsample", "upsample"):
            if hasattr(level, resize):
                yield getattr(level, resize)


def _reject_unknown(others: Iterable[str], but: Sequence[str]) -> None:
    """Encoder and decoder are built from one `ddconfig`, in which some words concern only the other."""
    unknown = sorted(set(others) - set(but))
    if unknown:
        raise UserError(f"yaml: ddconfig.{unknown[0]}: unknown to the autoencoder")


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] -> features [B, (2) z_channels, H/f, W/f], f = 2 ** (len(ch_mult) - 1).

    The arguments are `ddconfig` in the autoencoders' yaml.

    Args:
        ch: the base width. ch_mult: its multiple at each size. num_res_blocks: at each size.
        attn_resolutions: sizes, for pictures of `resolution`, at which attention follows each block.
        in_channels, out_ch: channels of the images. z_channels: of the features. resolution: pixels a side.
        dropout: of residual blocks, in training.
        double_z: mean and log variance. resamp_with_conv: resample with a convolution.
        attn_type: vanilla (or vanilla-xformers, which is the same) or none.
        num_groups: of the normalisation, for widths that 32 does not divide.

    Raises:
        UserError: an argument is unknown or does not fit.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        attn_type: str = "vanilla",
        num_groups: int = 32,
        **others: Any,
    ) -> None:
        super().__init__()
        _reject_unknown(others, but=("give_pre_end", "tanh_out"))
        blocks = Blocks(attn_type, dropout, num_groups)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, multiple in enumerate(ch_mult):
            level = blocks.level(channels, ch * multiple, num_res_blocks, resolution in attn_resolutions)
            channels = ch * multiple
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(channels, resamp_with_conv)
                resolution //= 2
            self.down.append(level)
        self.mid = blocks.middle(channels)
        self.norm_out = Normalize(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for layer in _layers_of(self.down):
            h = layer(h)
        return self.conv_out(_silu(self.norm_out(_run_middle(self.mid, h))))


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] -> images [B, out_ch, f * h, f * w]; the arguments are the Encoder's.

    Args:
        give_pre_end: stop before the last normalisation. tanh_out: images strictly within (-1, 1).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        attn_type: str = "vanilla",
        num_groups: int = 32,
        **others: Any,
    ) -> None:
        super().__init__()
        _reject_unknown(others, but=("double_z",))
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        blocks = Blocks(attn_type, dropout, num_groups)
        channels = ch * ch_mult[-1]
        resolution //= 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = blocks.middle(channels)
        levels = []
        for i, multiple in reversed(list(enumerate(ch_mult))):
            level = blocks.level(channels, ch * multiple, num_res_blocks + 1, resolution in attn_resolutions)
            channels = ch * multiple
            if i:
                level.upsample = Upsample(channels, resamp_with_conv)
                resolution *= 2
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = Normalize(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight whose gradient balances the adversarial loss (Esser et al., 2021, eq. 7)."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = _run_middle(self.mid, self.conv_in(z))
        for layer in _layers_of(reversed(self.up)):
            h = layer(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(_silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
