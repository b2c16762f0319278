"""The U-Net of Stable Diffusion v1 and v2, here and in diffusers (UNet2DConditionModel)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ldm.errors import UserError
from ldm.exchange.names import Names, multiples, require, under

WHERE_YAML = "yaml: unet_config.params"
WHERE_JSON = "unet/config.json"
DOWN, DOWN_ATTENTION = "DownBlock2D", "CrossAttnDownBlock2D"
UP, UP_ATTENTION = "UpBlock2D", "CrossAttnUpBlock2D"
MIDDLE = "UNetMidBlock2DCrossAttn"
# What diffusers takes when a config file does not say it.
THEIR_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [DOWN_ATTENTION] * 3 + [DOWN],
    "up_block_types": [UP] + [UP_ATTENTION] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "resnet_time_scale_shift": "default",
    "dropout": 0.0,
    "mid_block_type": MIDDLE,
}
THEIR_ONLY: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "cross_attention_norm": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
}
OUR_ONLY: dict[str, Any] = {
    "dims": 2,
    "conv_resample": True,
    "use_spatial_transformer": True,
    "resblock_updown": False,
    "num_classes": None,
    "n_embed": None,
}

RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


def names(params: Mapping[str, Any]) -> Names:
    """The table of names of the U-Net that `unet_config.params` describes."""
    return Names(_pairs(int(params["num_res_blocks"]), _attention(params), _has_middle(params)))


def _pairs(res_blocks: int, attention: list[bool], middle: bool) -> Iterator[tuple[str, str]]:
    yield from ENDS
    place, levels = 1, len(attention)
    for level in range(levels):
        for i in range(res_blocks):
            there = f"down_blocks.{level}"
            yield from under(f"input_blocks.{place}.0", f"{there}.resnets.{i}", RESNET)
            if attention[level]:
                yield f"input_blocks.{place}.1", f"{there}.attentions.{i}"
            place += 1
        if level < levels - 1:
            yield f"input_blocks.{place}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            place += 1
    if middle:
        yield from under("middle_block.0", "mid_block.resnets.0", RESNET)
        yield "middle_block.1", "mid_block.attentions.0"
        yield from under("middle_block.2", "mid_block.resnets.1", RESNET)
    for step, level in enumerate(reversed(range(levels))):
        for i in range(res_blocks + 1):
            here, there = f"output_blocks.{step * (res_blocks + 1) + i}", f"up_blocks.{step}"
            yield from under(f"{here}.0", f"{there}.resnets.{i}", RESNET)
            if attention[level]:
                yield f"{here}.1", f"{there}.attentions.{i}"
            if level and i == res_blocks:
                yield f"{here}.{1 + attention[level]}.conv", f"{there}.upsamplers.0.conv"


def _attention(params: Mapping[str, Any]) -> list[bool]:
    """For each level whether its blocks have attention."""
    return [2**level in params["attention_resolutions"] for level in range(len(params["channel_mult"]))]


def _has_middle(params: Mapping[str, Any]) -> bool:
    return params.get("use_middle_block", True)


def to_diffusers(params: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """`unet/config.json` for our `unet_config.params`; `sample_size` is the latents' height and width.

    Raises:
        UserError: diffusers' U-Net has no such option.
    """
    require(params, OUR_ONLY, WHERE_YAML)
    if list(params["channel_mult"])[:1] != [1]:
        raise UserError(f"{WHERE_YAML}: channel_mult must begin with 1 for diffusers")
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    attention = _attention(params)
    size = params.get("num_head_channels", -1)
    heads = [params["num_heads"] if size == -1 else max(1, width // size) for width in widths]
    context = params["context_dim"]
    return {
        **THEIR_ONLY,
        "sample_size": sample_size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": [DOWN_ATTENTION if has else DOWN for has in attention],
        "mid_block_type": MIDDLE if _has_middle(params) else None,
        "up_block_types": [UP_ATTENTION if has else UP for has in reversed(attention)],
        "attention_head_dim": heads[0] if size == -1 else heads,  # diffusers' word for the number of heads
        "cross_attention_dim": context if isinstance(context, int) else context[0],
        "transformer_layers_per_block": params.get("transformer_depth", 1),
        "use_linear_projection": params.get("use_linear_in_transformer", False),
        "resnet_time_scale_shift": "scale_shift" if params.get("use_scale_shift_norm") else "default",
        "dropout": params.get("dropout", 0.0),
    }


def from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `unet_config.params` for a `unet/config.json`.

    Raises:
        UserError: it describes another network than Stable Diffusion v1's and v2's.
    """
    require(config, THEIR_ONLY, WHERE_JSON)
    config = THEIR_DEFAULTS | dict(config)
    for key in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        if not isinstance(config[key], int):
            raise UserError(f"{WHERE_JSON}: {key} is {config[key]!r}, and only one number for all blocks is supported")
    down, up, widths = (list(config[key]) for key in ("down_block_types", "up_block_types", "block_out_channels"))
    attention = [kind == DOWN_ATTENTION for kind in down]
    expected = [UP_ATTENTION if has else UP for has in reversed(attention)]
    if up != expected or set(down) - {DOWN, DOWN_ATTENTION} or len(down) != len(widths):
        raise UserError(f"{WHERE_JSON}: the blocks {down} and {up} are not those of a Stable Diffusion U-Net")
    middle = config["mid_block_type"] is not None
    if middle:
        require(config, {"mid_block_type": MIDDLE}, WHERE_JSON)
    return {
        "image_size": config.get("sample_size") or 64,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "attention_resolutions": [2**level for level, has in enumerate(attention) if has][::-1],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": multiples(widths, WHERE_JSON),
        **({} if middle else {"use_middle_block": False}),
        **_heads(config, widths, attention, middle),
        "use_spatial_transformer": True,
        **({"use_linear_in_transformer": True} if config["use_linear_projection"] else {}),
        **({"use_scale_shift_norm": True} if config["resnet_time_scale_shift"] == "scale_shift" else {}),
        **({"dropout": config["dropout"]} if config["dropout"] else {}),
        "transformer_depth": config["transformer_layers_per_block"],
        "context_dim": config["cross_attention_dim"],
        "use_checkpoint": True,
        "legacy": False,
    }


def _heads(config: Mapping[str, Any], widths: list[int], attention: list[bool], middle: bool) -> dict[str, int]:
    """`num_heads`, the same everywhere as in v1, or `num_head_channels`, as in v2."""
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    if isinstance(heads, int):
        return {"num_heads": heads}
    with_attention = [*attention[:-1], attention[-1] or middle]  # the middle block's are the last level's
    used = [(width, count) for width, count, has in zip(widths, heads, with_attention, strict=True) if has]
    counts, sizes = {count for _, count in used}, {width / count for width, count in used}
    if len(sizes) == 1 and (size := sizes.pop()).is_integer():
        return {"num_head_channels": int(size)}
    if len(counts) == 1:
        return {"num_heads": counts.pop()}
    raise UserError(f"{WHERE_JSON}: attention_head_dim {list(heads)} fits neither num_heads nor num_head_channels")
