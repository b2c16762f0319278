import re

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.goldens.fill import data, fill
from tests.networks import TIMESTEPS, relative_error

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}


def their_name(key, res_blocks):
    """diffusers' name of one of our state-dict keys."""
    for ours, theirs in ENDS.items():
        if key.startswith(ours + "."):
            return rename_inside(theirs + key[len(ours) :])
    way, block, layer, rest = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", key).groups()
    if rest.startswith("op."):
        return f"down_blocks.{int(block) // (res_blocks + 1) - 1}.downsamplers.0.conv.{rest[3:]}"
    place, side = (int(block) - 1, "down") if way == "input" else (int(block), "up")
    level, index = divmod(place, res_blocks + 1)
    if rest.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    kind = "resnets" if layer == "0" else "attentions"
    return rename_inside(f"{side}_blocks.{level}.{kind}.{index}.{rest}")


def rename_inside(name):
    for ours, theirs in RESNET.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def both(ours, theirs):
    from diffusers import UNet2DConditionModel

    unet = fill(UNetModel(image_size=16, in_channels=4, out_channels=4, use_spatial_transformer=True, **ours)).eval()
    peer = UNet2DConditionModel(sample_size=16, **theirs).eval()
    state = {their_name(k, ours["num_res_blocks"]): v for k, v in unet.state_dict().items()}
    peer.load_state_dict(state)
    return unet, peer


V1_SHAPED = (
    {
        "model_channels": 64,
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3],
        "attention_resolutions": [1, 2],
        "num_heads": 8,
        "context_dim": 40,
        "legacy": False,
    },
    {
        "block_out_channels": (64, 128, 192),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 40,
    },
)
V2_SHAPED = (
    {
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": [1, 3],
        "attention_resolutions": [1, 2],
        "num_head_channels": 16,
        "context_dim": 48,
        "transformer_depth": 2,
        "use_linear_in_transformer": True,
        "legacy": False,
    },
    {
        "block_out_channels": (32, 96),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": (2, 6),
        "cross_attention_dim": 48,
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
    },
)


@pytest.mark.parametrize("ours, theirs", [V1_SHAPED, V2_SHAPED], ids=["v1", "v2"])
@pytest.mark.parametrize("height, width", [(16, 16), (8, 24), (13, 10)])
def test_same_output(ours, theirs, height, width):
    unet, peer = both(ours, theirs)
    x, context = data("peerx", (2, 4, height, width)), data("peerc", (2, 7, ours["context_dim"]))
    with torch.no_grad():
        expected = peer(x, TIMESTEPS, encoder_hidden_states=context).sample
        assert relative_error(unet(x, TIMESTEPS, context), expected) < 1e-4
