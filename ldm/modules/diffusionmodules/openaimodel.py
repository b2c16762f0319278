"""The U-Net of latent diffusion: ADM's (Dhariwal & Nichol, 2021) with spatial transformers (Rombach et al., 2022).

Module structure and state-dict keys are CompVis', so their checkpoints load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules import adapter_files, adapters
from ldm.modules.adapters import AdaptableBlock
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    normalization,
    timestep_embedding,
    zero_module,
)


class Upsample(nn.Module):
    """Doubles height and width (not depth, for 3-D inputs) by nearest neighbour, then convolves if asked to."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.factors = (1, 2, 2) if dims == 3 else (2,) * dims
        out_channels = out_channels or channels
        self.conv = conv_nd(dims, channels, out_channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factors, mode="nearest"))


class Downsample(nn.Module):
    """Halves height and width (not depth, for 3-D inputs) by a strided convolution, or by averaging."""

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

    `use_new_attention_order` says how the rows of `qkv` are laid out: q, k, v, each of all heads; otherwise, as in
    older checkpoints, each head's q, k, v together.
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
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(-1, -2).flatten(1, 2)).view_as(x)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the timestep embedding and the context to those of its layers that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class BlockFactory:
    """Makes the blocks of one U-Net: what is the same for all of them, given once."""

    dims: int
    emb_channels: int
    dropout: float
    use_checkpoint: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    conv_resample: bool
    num_heads: int
    num_heads_upsample: int
    num_head_channels: int
    legacy: bool
    use_new_attention_order: bool
    use_spatial_transformer: bool
    transformer_depth: int
    context_dim: int | None
    use_linear_in_transformer: bool

    def res_block(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def downsample(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def upsample(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)

    def attention(self, channels: int, upwards: bool = False) -> nn.Module:
        heads = self._heads(channels, upwards)
        if not self.use_spatial_transformer:
            return AttentionBlock(channels, heads, self.use_checkpoint, self.use_new_attention_order)
        return SpatialTransformer(
            channels,
            heads,
            channels // heads,
            depth=self.transformer_depth,
            context_dim=self.context_dim,
            use_linear=self.use_linear_in_transformer,
            use_checkpoint=self.use_checkpoint,
        )

    def _heads(self, channels: int, upwards: bool) -> int:
        """Number of heads; `num_heads_upsample` counts only where CompVis' code lets it."""
        by_count = self.num_head_channels == -1
        upsample_counts = upwards and self.legacy and not self.use_spatial_transformer
        heads = self.num_heads_upsample if upsample_counts else self.num_heads
        name, divisor = ("num_heads", heads) if by_count else ("num_head_channels", self.num_head_channels)
        if divisor < 1 or channels % divisor:
            raise UserError(f"unet_config: {name} {divisor} does not divide an attention block's {channels} channels")
        return heads if by_count else channels // divisor


class UNetModel(nn.Module):
    """U-Net with attention and timestep embedding; its keyword arguments are those of CompVis' yaml files.

    `attention_resolutions` are the downsampling factors (1, 2, 4 ...) at which there is attention; with
    `use_spatial_transformer` it is also over a context of width `context_dim`. `num_heads` or `num_head_channels`
    must be given. `use_linear_in_transformer` is Stable Diffusion v2's.

    Raises:
        UserError: the options contradict one another.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        use_linear_in_transformer: bool = False,
    ) -> None:
        super().__init__()
        if use_spatial_transformer != (context_dim is not None):
            raise UserError("unet_config: use_spatial_transformer and context_dim go together: give both or none")
        if num_heads == -1 and num_head_channels == -1:
            raise UserError("unet_config: give num_heads or num_head_channels")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.context_dim = context_dim if context_dim is None or isinstance(context_dim, int) else context_dim[0]
        self.predict_codebook_ids = n_embed is not None
        blocks = BlockFactory(
            dims=dims,
            emb_channels=model_channels * 4,
            dropout=dropout,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            num_heads=num_heads,
            num_heads_upsample=num_heads if num_heads_upsample == -1 else num_heads_upsample,
            num_head_channels=num_head_channels,
            legacy=legacy,
            use_new_attention_order=use_new_attention_order,
            use_spatial_transformer=use_spatial_transformer,
            transformer_depth=transformer_depth,
            context_dim=self.context_dim,
            use_linear_in_transformer=use_linear_in_transformer,
        )
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, blocks.emb_channels),
            nn.SiLU(),
            nn.Linear(blocks.emb_channels, blocks.emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, blocks.emb_channels)
        widths = [mult * model_channels for mult in channel_mult]
        self._build_levels(blocks, widths, num_res_blocks, tuple(attention_resolutions))
        self.out = nn.Sequential(
            normalization(widths[0]), nn.SiLU(), zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1))
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(widths[0]), conv_nd(dims, widths[0], n_embed, 1))
        if use_fp16:
            self.half()

    def _build_levels(
        self, blocks: BlockFactory, widths: list[int], num_res_blocks: int, attention_at: tuple[int, ...]
    ) -> None:
        """Input, middle and output blocks; level i works on 1 / 2**i of the image's height and width."""
        channels = self.model_channels
        first = conv_nd(blocks.dims, self.in_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [blocks.res_block(channels, width)]
                channels = width
                if 2**level in attention_at:
                    layers.append(blocks.attention(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level != len(widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(blocks.downsample(channels)))
                skips.append(channels)

        self.middle_block = TimestepEmbedSequential(
            blocks.res_block(channels, channels), blocks.attention(channels), blocks.res_block(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [blocks.res_block(channels + skips.pop(), width)]
                channels = width
                if 2**level in attention_at:
                    layers.append(blocks.attention(channels, upwards=True))
                if level and i == num_res_blocks:
                    layers.append(blocks.upsample(channels))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in (outside autocast)."""
        return self.input_blocks[0][0].weight.dtype

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The network's prediction for noisy `x`.

        Args:
            x: [B, in_channels, H, W]; H and W are multiples of the deepest level's downsampling.
            timesteps: [B], integers or fractions in [0, number of training timesteps).
            context: [B, M, context_dim], what cross-attention looks at.
            y: [B] class labels, exactly when the model has `num_classes`.

        Returns:
            [B, out_channels, H, W] in x's dtype, or [B, n_embed, H, W] logits of a model with `n_embed`.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y are given exactly when the model has num_classes")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        if context is not None:
            context = context.to(self.dtype)
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        head = self.id_predictor if self.predict_codebook_ids else self.out
        return head(h).to(x.dtype)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of every injected adapter."""
        return adapters.adapter_parameters(self)

    def adapters_enable(self, enabled: bool = True) -> None:
        """Switch every adapter on or off; off computes exactly what the base model does."""
        adapters.enable(self, enabled)

    def save_adapter_to_dir(self, path: str | os.PathLike[str], **trained_on: Any) -> None:
        """Write the adapters to the directory `path`; `trained_on` goes into the manifest beside them."""
        adapter_files.save(self, path, trained_on)

    def load_adapter_from_dir(self, path: str | os.PathLike[str]) -> None:
        """Read adapters that `save_adapter_to_dir`, here or in the original, wrote to the directory `path`."""
        adapter_files.load(self, path)
