"""The blocks of the U-Net: residual, resampling, self-attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.adapters import AdaptableBlock
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import avg_pool_nd, checkpoint, conv_nd, normalization, zero_module
from ldm.modules.tiling import attention


class Upsample(nn.Module):
    """Doubles height and width (of 3-D inputs not the depth) by nearest neighbour, or brings them to a given size,
    which is one less where a Downsample rounded up; may then convolve."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.factors = (1, 2, 2) if dims == 3 else (2,) * dims
        out_channels = out_channels or channels
        self.conv = conv_nd(dims, channels, out_channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        factors = self.factors if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=factors, mode="nearest"))


class Downsample(nn.Module):
    """Halves height and width (of 3-D inputs not the depth) by a strided convolution, or by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        out_channels = out_channels or channels
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(AdaptableBlock):
    """Two convolutions with the timestep embedding between them, and a residual; may also change resolution.

    It announces its input and output to adapters unless it is an up- or downsampling block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resamples = up or down
        if not self.resamples:
            self.positions = ("resi", "reso")
            self.widths = {"resi": channels, "reso": out_channels}
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.resamples else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.resamples else nn.Identity()
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, channels, H, W], [B, emb_channels] -> [B, out_channels, H', W']."""
        return checkpoint(self._forward, x, emb, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        at = self.announcer()
        x = at("resi", x)
        norm, activation, conv = self.in_layers
        h = conv(self.h_upd(activation(norm(x))))
        x = self.x_upd(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        emb_out = emb_out.reshape(*emb_out.shape, *((1,) * (h.dim() - 2)))
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb_out)
        return at("reso", self.skip_connection(x) + h)


class AttentionBlock(nn.Module):
    """Self-attention over image positions as in ADM: [B, C, ...] -> [B, C, ...].

    `use_new_attention_order` says how the rows of `qkv` are laid out: q, k, v, each of all heads; otherwise,
    as in older checkpoints, each head's q, k, v together.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.slice_size: int | None = None
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.use_new_attention_order:
            q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).transpose(-1, -2).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.num_heads, 3, -1)).transpose(-1, -2).unbind(2)
        h = attention(q, k, v, self.slice_size)
        return x + self.proj_out(h.transpose(-1, -2).flatten(1, 2)).view_as(x)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the timestep embedding, the context and the size to come to the layers that take them."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x
