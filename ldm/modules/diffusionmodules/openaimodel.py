"""The U-Net of latent diffusion (Rombach et al., 2022): that of ADM, with spatial transformers.

Module structure and state-dict keys are CompVis', so their checkpoints load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules import adapter_files, adapters
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module


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

    Args:
        image_size: side of what is drawn; the network takes any.
        in_channels, out_channels: of its input and output. model_channels: the base width.
        channel_mult: multiples of the base width, one a level; each level halves the size of the one before.
        num_res_blocks: residual blocks a level, on the way down; one more on the way up.
        attention_resolutions: the downsampling factors (1, 2, 4 ...) at which there is attention.
        use_spatial_transformer: attention is also over a context. context_dim: its width; both are given or none.
        transformer_depth: transformer blocks in each place. use_linear_in_transformer: as in Stable Diffusion v2.
        num_heads, num_head_channels: how many heads attention has, or how wide each is; one of the two must be given.
        num_heads_upsample: heads on the way up, where `legacy` and no `use_spatial_transformer` let it; -1: the same.
        use_new_attention_order: how heads are cut out of the channels; matters to
            checkpoints of models without `use_spatial_transformer`.
        num_classes: how many classes there are, for models led by a class label `y`; None for others.
        dropout: of residual blocks, in training. use_scale_shift_norm: timesteps scale and shift the normalised values.
        conv_resample: change sizes by a convolution. resblock_updown: by residual blocks.
        dims: 1, 2 or 3, of the convolutions. n_embed: predict logits of that many codebook entries instead.
        use_checkpoint: recompute activations in the backward pass instead of keeping them. use_fp16: half precision.
        use_middle_block: false: the way up begins where the way down ends, as in BK-SDM's pruned U-Nets.

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
        use_middle_block: bool = True,
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
        self._build_levels(blocks, widths, num_res_blocks, tuple(attention_resolutions), use_middle_block)
        self.out = nn.Sequential(
            normalization(widths[0]),
            nn.SiLU(),
            zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1)),
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(widths[0]), conv_nd(dims, widths[0], n_embed, 1))
        if use_fp16:
            self.half()

    def _build_levels(
        self,
        blocks: BlockFactory,
        widths: list[int],
        num_res_blocks: int,
        attention_at: tuple[int, ...],
        use_middle_block: bool,
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

        self.middle_block = None
        if use_middle_block:
            self.middle_block = TimestepEmbedSequential(
                blocks.res_block(channels, channels),
                blocks.attention(channels),
                blocks.res_block(channels, channels),
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

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The network's prediction for noisy `x`.

        Args:
            x: [B, in_channels, H, W] of any H and W; with `resblock_updown` they are multiples of the deepest
                level's downsampling.
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
        if self.middle_block is not None:
            h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, size=skips[-1].shape[2:] if skips else None)
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
        """Read adapters that `save_adapter_to_dir` wrote to the directory `path`, here or in the original."""
        adapter_files.load(self, path)
