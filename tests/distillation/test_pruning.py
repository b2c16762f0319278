"""Pruned U-Nets: how many parameters, out of which blocks, and which blocks are compared; the oracle is diffusers."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint import empty_weights
from ldm.distillation.bksdm import block_outputs
from ldm.distillation.pruning import cut, feature_pairs
from ldm.errors import UserError
from ldm.exchange import unet as exchange
from ldm.identify import config_of
from ldm.modules import adapters
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.unet_layout import UNET, UNetLayout
from ldm.util import count_params, instantiate_from_config, load_yaml
from tests.goldens.fill import data, fill
from tests.networks import GOLDENS, ROOT, TIMESTEPS, relative_error
from tests.pipelines import libraries

GOLDEN = json.loads((GOLDENS / "bksdm.json").read_text())
V1 = load_yaml(ROOT / "configs/stable-diffusion/v1-inference.yaml")
# Stable Diffusion v1's U-Net made narrow: equal widths, so that most blocks also fit the place of others.
NARROW: dict[str, Any] = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2, "channel_mult": [1, 1, 1, 1], "num_heads": 4, "use_spatial_transformer": True,
    "context_dim": 24, "legacy": False,
}  # fmt: skip
CUTS: dict[str, dict[str, Any]] = {
    "sd_small": {"num_res_blocks": 1},
    "sd_tiny": {"num_res_blocks": 1, "channel_mult": [1, 1, 1], "use_middle_block": False},
}
# What the authors' code compares, in diffusers' names: (the student's, the teacher's).
PAIRS = {
    "sd_small": [(name, name) for name in (*(f"down_blocks.{i}" for i in range(4)), "mid_block",
                                           *(f"up_blocks.{i}" for i in range(4)))],
    "sd_tiny": [("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1"),
                ("down_blocks.2", "up_blocks.0"), *((f"up_blocks.{i}", f"up_blocks.{i + 1}") for i in range(3))],
}  # fmt: skip


def full_size(name: str) -> Any:
    return load_yaml(ROOT / f"configs/distill/{name.replace('_', '-')}.yaml").model.params.unet_config


def in_model(unet: nn.Module) -> dict[str, Tensor]:
    """Its weights, named as in a whole model's."""
    return {UNET + key: value for key, value in unet.state_dict().items()}


def narrow(cut_name: str | None = None) -> UNetModel:
    return fill(UNetModel(**NARROW | CUTS.get(cut_name, {}))).eval()


def pruned_by_hand(teacher: nn.Module, name: str) -> nn.Module:
    """diffusers' U-Net after what the authors' code does to it: layers are taken out, and the last moved up."""
    unet = copy.deepcopy(teacher)
    for block in unet.down_blocks:
        for layers in (block.resnets, getattr(block, "attentions", None)):
            if layers is not None:
                del layers[1]
    for block in unet.up_blocks:
        for layers in (block.resnets, getattr(block, "attentions", None)):
            if layers is not None:
                layers[1] = layers[2]
                del layers[2]
    if name == "sd_tiny":
        unet.mid_block = None
        del unet.down_blocks[3], unet.up_blocks[0]
        unet.down_blocks[2].downsamplers = None
    return unet


def in_diffusers(unet: UNetModel, params: dict[str, Any]) -> nn.Module:
    diffusers, _ = libraries()
    peer = diffusers.UNet2DConditionModel.from_config(exchange.to_diffusers(params, 16)).eval()
    names = exchange.names(params)
    peer.load_state_dict({names.theirs(key): value for key, value in unet.state_dict().items()})
    return peer


def their_outputs(unet: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """What blocks of diffusers' U-Net put out, filled in when it runs; those on the way down put out more."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    for name in names:
        unet.get_submodule(name).register_forward_hook(partial(keep, name))
    return outputs


@pytest.mark.parametrize("name", CUTS)
def test_counts_and_modules_at_full_size(name: str) -> None:
    section = full_size(name)
    with empty_weights():
        unet = instantiate_from_config(section)
    assert (count_params(unet), len(unet.state_dict())) == (GOLDEN[name]["parameters"], GOLDEN[name]["tensors"])
    names = [exchange.names(section.params).theirs(key) for key in unet.state_dict()]
    modules = {".".join(key.split(".")[: 1 if key.startswith("mid") else 4]) for key in names if "_block" in key}
    assert modules == set(GOLDEN[name]["modules_in_diffusers_names"])
    as_v1 = V1.model.params.unet_config.params | UNetLayout.of_params(section.params).params() | {"image_size": 64}
    assert as_v1 == {"use_middle_block": True} | dict(section.params)


@pytest.mark.parametrize("name", CUTS)
def test_checkpoints_of_either_size_are_known_by_their_weights(name: str, tmp_path: Any) -> None:
    with empty_weights():
        unet = instantiate_from_config(full_size(name))
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    config = config_of(tmp_path / "model.ckpt", state=in_model(unet))
    with empty_weights():
        found = instantiate_from_config(config.model.params.unet_config)
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in unet.state_dict().items()}
    assert config.model.target == V1.model.target


@pytest.mark.parametrize("name", CUTS)
def test_students_are_cut_out_of_the_blocks_of_the_seed(name: str) -> None:
    params = NARROW | CUTS[name]
    teacher, student = narrow(), UNetModel(**params).eval()
    layouts = UNetLayout.of_params(params), UNetLayout.of_params(NARROW)
    assert layouts == (UNetLayout.of_weights(in_model(student)), UNetLayout.of_weights(in_model(teacher)))
    others = {"first_stage_model.encoder.conv_in.weight": torch.ones(1)}
    state = cut(in_model(teacher) | others, *layouts)
    assert state.pop("first_stage_model.encoder.conv_in.weight") is not None
    student.load_state_dict({key.removeprefix(UNET): value for key, value in state.items()})
    peer = pruned_by_hand(in_diffusers(teacher, NARROW), name)
    theirs = {exchange.names(params).ours(key): value for key, value in peer.state_dict().items()}
    assert theirs.keys() == student.state_dict().keys()
    assert all(torch.equal(value, theirs[key]) for key, value in student.state_dict().items())
    x, context = data("peerx", (2, 4, 16, 16)), data("peerc", (2, 7, 24))
    with torch.no_grad():
        expected = peer(x, TIMESTEPS, encoder_hidden_states=context).sample
        assert relative_error(student(x, TIMESTEPS, context), expected) < 1e-4


@pytest.mark.parametrize("name", CUTS)
def test_features_are_those_that_the_seed_compares(name: str) -> None:
    params = NARROW | CUTS[name]
    unets = narrow(name), narrow()
    pairs = feature_pairs(UNetLayout.of_params(params), UNetLayout.of_params(NARROW))
    assert len(pairs) == len(PAIRS[name])
    x, context = data("peerx", (2, 4, 16, 16)), data("peerc", (2, 7, 24))
    for side, (unet, settings) in enumerate(zip(unets, (params, NARROW), strict=True)):
        peer = in_diffusers(unet, settings)
        expected = their_outputs(peer, {pair[side] for pair in PAIRS[name]})
        with torch.no_grad(), block_outputs(unet, [pair[side] for pair in pairs]) as found:
            unet(x, TIMESTEPS, context)
            peer(x, TIMESTEPS, encoder_hidden_states=context)
        for ours, theirs in zip(pairs, PAIRS[name], strict=True):
            assert relative_error(found[ours[side]], expected[theirs[side]]) < 1e-4, theirs[side]
    unets[0](x, TIMESTEPS, context)
    assert not unets[0].input_blocks[1]._forward_hooks


@pytest.mark.parametrize(
    "student, teacher, pairs",
    [
        (UNetLayout((1, 2), 1), UNetLayout((1, 2, 2), 1), 4),
        (UNetLayout((1, 2), 1, False), UNetLayout((1, 2, 2), 1), 4),
        (UNetLayout((1, 2, 2), 1, False), UNetLayout((1, 2, 2), 1), 6),
        (UNetLayout((1, 2, 2), 1), UNetLayout((1, 2, 2), 3), 7),
        (UNetLayout((1,), 1, False), UNetLayout((1, 2, 2), 2, False), 1),
    ],
)
def test_compared_blocks_have_the_same_shapes(student: UNetLayout, teacher: UNetLayout, pairs: int) -> None:
    found = feature_pairs(student, teacher)
    assert len(found) == pairs
    shapes = []
    for side, layout in enumerate((student, teacher)):
        unet = UNetModel(**NARROW | layout.params())
        with torch.no_grad(), block_outputs(unet, [pair[side] for pair in found]) as outputs:
            unet(data("x", (1, 4, 8, 8)), TIMESTEPS[:1], data("c", (1, 3, 24)))
        shapes.append([outputs[pair[side]].shape for pair in found])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("changes", [{"num_res_blocks": 3}, {"channel_mult": [1, 1, 2]}, {"channel_mult": [1] * 5}])
def test_a_student_that_is_no_part_of_its_teacher_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot be cut out of a teacher of channel_mult"):
        cut({}, UNetLayout.of_params(NARROW | changes), UNetLayout.of_params(NARROW))


def test_adapters_and_checkpointing_work_without_a_middle() -> None:
    x, context, grads = data("x", (2, 4, 16, 16)), data("c", (2, 5, 24)), []
    entry = {"type": "inout", "din": "attn2o", "dout": "ffni", "mid_dim": 4, "method": "default", "init": "default"}
    for use_checkpoint in (False, True):
        unet = fill(UNetModel(**NARROW | CUTS["sd_tiny"], use_checkpoint=use_checkpoint))
        plain = unet(x, TIMESTEPS, context)
        adapters.inject(unet, {"transformer_adp_config": [entry]})
        for name, adapter in adapters.find(unet).items():
            fill(adapter, f"{name}.")
        assert len(adapters.find(unet)) == 9  # three on the way down, six up
        out = unet(x, TIMESTEPS, context)
        assert relative_error(out, plain.detach()) > 1e-3
        out.square().mean().backward()
        grads.append([p.grad for p in unet.parameters()])
        unet.adapters_enable(False)
        assert torch.equal(unet(x, TIMESTEPS, context), plain)
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
