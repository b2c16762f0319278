"""The KL autoencoder, here and in diffusers (AutoencoderKL)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ldm.errors import UserError
from ldm.exchange.names import Names, multiples, require, under

WHERE_YAML = "yaml: first_stage_config.params"
WHERE_JSON = "vae/config.json"
DOWN, DOWN_ATTENTION = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, UP_ATTENTION = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
THEIR_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "down_block_types": [DOWN],
    "up_block_types": [UP],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
THEIR_ONLY: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
OUR_ONLY: dict[str, Any] = {"double_z": True, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False}

RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
# What diffusers called these layers until 0.17; such folders are still about.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PROJECTIONS = tuple(f".{there}.weight" for _, there in ATTENTION[1:])


def names(ddconfig: Mapping[str, Any]) -> Names:
    """The table of names of the autoencoder that `first_stage_config.params.ddconfig` describes."""
    return Names(_pairs(len(ddconfig["ch_mult"]), ddconfig["num_res_blocks"]))


def _pairs(levels: int, res_blocks: int) -> Iterator[tuple[str, str]]:
    for whole in ("quant_conv", "post_quant_conv"):
        yield whole, whole
    for side in ("encoder", "decoder"):
        for ours, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{side}.{ours}", f"{side}.{theirs}"
        for i in (0, 1):
            yield from under(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}", RESNET)
        yield from under(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", ATTENTION)
    for level in range(levels):
        ours = f"encoder.down.{level}"
        yield from _level(ours, f"encoder.down_blocks.{level}", res_blocks)
        yield f"{ours}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        theirs = f"decoder.up_blocks.{levels - 1 - level}"
        yield from _level(f"decoder.up.{level}", theirs, res_blocks + 1)
        yield f"decoder.up.{level}.upsample.conv", f"{theirs}.upsamplers.0.conv"


def _level(ours: str, theirs: str, blocks: int) -> Iterator[tuple[str, str]]:
    for i in range(blocks):
        yield from under(f"{ours}.block.{i}", f"{theirs}.resnets.{i}", RESNET)
        yield from under(f"{ours}.attn.{i}", f"{theirs}.attentions.{i}", ATTENTION)


def modern(key: str) -> str:
    """diffusers' present name of a key of any age."""
    module, _, kind = key.rpartition(".")
    parent, _, layer = module.rpartition(".")
    return f"{parent}.{OLD_ATTENTION[layer]}.{kind}" if layer in OLD_ATTENTION else key


def weight_to_diffusers(key: str, value: torch.Tensor) -> torch.Tensor:
    """The 1x1 convolutions [C, C, 1, 1] of attention are linear layers [C, C] there; `key` is diffusers' name."""
    return value.flatten(1) if key.endswith(PROJECTIONS) and value.ndim == 4 else value


def weight_from_diffusers(key: str, value: torch.Tensor) -> torch.Tensor:
    """The other way round; `key` is diffusers' name."""
    return value[..., None, None] if key.endswith(PROJECTIONS) and value.ndim == 2 else value


def to_diffusers(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """`vae/config.json` for our `first_stage_config.params`; latents are multiplied by `scale_factor`.

    Raises:
        UserError: diffusers' autoencoder has no such option.
    """
    dd = params["ddconfig"]
    require(dd, OUR_ONLY, f"{WHERE_YAML}.ddconfig")
    if list(dd["ch_mult"])[:1] != [1]:
        raise UserError(f"{WHERE_YAML}.ddconfig: ch_mult must begin with 1 for diffusers")
    if params["embed_dim"] != dd["z_channels"]:
        raise UserError(f"{WHERE_YAML}: embed_dim must be ddconfig.z_channels for diffusers")
    plain = dd.get("attn_type", "vanilla") == "none"
    sizes = [dd["resolution"] // 2**level for level in range(len(dd["ch_mult"]))]
    attention = [size in dd["attn_resolutions"] and not plain for size in sizes]
    return {
        **THEIR_ONLY,
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "latent_channels": dd["z_channels"],
        "block_out_channels": [dd["ch"] * mult for mult in dd["ch_mult"]],
        "down_block_types": [DOWN_ATTENTION if has else DOWN for has in attention],
        "up_block_types": [UP_ATTENTION if has else UP for has in reversed(attention)],
        "layers_per_block": dd["num_res_blocks"],
        "norm_num_groups": dd.get("num_groups", 32),
        "sample_size": dd["resolution"],
        "scaling_factor": float(scale_factor),
        "mid_block_add_attention": not plain,
    }


def from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `first_stage_config.params` for a `vae/config.json`.

    Raises:
        UserError: it describes another network than LDM's autoencoder.
    """
    require(config, THEIR_ONLY, WHERE_JSON)
    config = THEIR_DEFAULTS | dict(config)
    widths, down, up = (list(config[key]) for key in ("block_out_channels", "down_block_types", "up_block_types"))
    attention = [kind == DOWN_ATTENTION for kind in down]
    expected = [UP_ATTENTION if has else UP for has in reversed(attention)]
    if up != expected or set(down) - {DOWN, DOWN_ATTENTION} or len(down) != len(widths):
        raise UserError(f"{WHERE_JSON}: the blocks {down} and {up} are not those of LDM's autoencoder")
    resolution = config["sample_size"]
    groups, middle = config["norm_num_groups"], config["mid_block_add_attention"]
    if any(attention) and not middle:
        raise UserError(f"{WHERE_JSON}: attention in some blocks and none in the middle is not supported")
    return {
        "embed_dim": config["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": config["latent_channels"],
            "resolution": resolution,
            "in_channels": config["in_channels"],
            "out_ch": config["out_channels"],
            "ch": widths[0],
            "ch_mult": multiples(widths, WHERE_JSON),
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [resolution // 2**level for level, has in enumerate(attention) if has],
            "dropout": 0.0,
            **({} if groups == 32 else {"num_groups": groups}),
            **({} if middle else {"attn_type": "none"}),
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }
