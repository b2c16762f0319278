import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import count_params
from tests.goldens.fill import data, fill
from tests.networks import ADM, GOLDENS, ROOT, SPATIAL, TIMESTEPS, relative_error, run, spatial_unet

GOLDEN = np.load(GOLDENS / "modules.npz")
KEYS = json.loads((GOLDENS / "keys.json").read_text())


def shapes(module):
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def test_spatial_transformer_model():
    unet = spatial_unet()
    assert shapes(unet) == KEYS["spatial"]
    assert relative_error(run(unet, "spatial"), GOLDEN["unet_spatial"]) < 1e-4


def test_class_conditional_model():
    unet = fill(UNetModel(**ADM)).eval()
    assert shapes(unet) == KEYS["adm"]
    with torch.no_grad():
        out = unet(data("admx", (2, 3, 16, 16)), TIMESTEPS, y=torch.tensor([3, 8]))
    assert relative_error(out, GOLDEN["unet_adm"]) < 1e-4


def test_stable_diffusion_v1_at_full_size():
    params = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params.unet_config.params
    with torch.device("meta"):
        unet = UNetModel(**params)
    assert shapes(unet) == KEYS["sd_v1_unet"]
    assert len(KEYS["sd_v1_unet"]) == 686
    assert count_params(unet) == 859_520_964


def test_the_two_attention_orders_are_permutations_of_one_another():
    kwargs = {k: v for k, v in ADM.items() if k != "num_classes"} | {"num_head_channels": 16}
    old = fill(UNetModel(**kwargs)).eval()
    new = UNetModel(**kwargs, use_new_attention_order=True).eval()
    state = old.state_dict()
    for key in state:
        if ".qkv." in key:
            heads = state[key].shape[0] // 3 // 16
            state[key] = state[key].unflatten(0, (heads, 3, 16)).transpose(0, 1).flatten(0, 2)
    new.load_state_dict(state)
    x = data("admx", (2, 3, 16, 16))
    with torch.no_grad():
        assert relative_error(new(x, TIMESTEPS), old(x, TIMESTEPS)) < 1e-5


def test_channels_last_and_a_new_size_give_the_same_function():
    unet = spatial_unet()
    x, context = data("x", (2, 4, 8, 24)), data("c", (2, 5, 24))
    with torch.no_grad():
        expected = unet(x, TIMESTEPS, context)
        unet.to(memory_format=torch.channels_last)
        assert relative_error(unet(x.to(memory_format=torch.channels_last), TIMESTEPS, context), expected) < 1e-4


def test_checkpointing_changes_no_gradient():
    grads = []
    for use_checkpoint in (False, True):
        unet = spatial_unet(use_checkpoint=use_checkpoint)
        unet(data("x", (2, 4, 16, 16)), TIMESTEPS, data("c", (2, 5, 24))).square().mean().backward()
        grads.append({name: p.grad for name, p in unet.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    unet = spatial_unet()
    expected = run(unet)
    half = run(unet.to(dtype))
    assert half.dtype == torch.float32
    assert relative_error(half, expected) < 0.1


def test_predicts_codebook_entries():
    unet = fill(UNetModel(**SPATIAL | {"n_embed": 7})).eval()
    assert run(unet).shape == (2, 7, 16, 16)


@pytest.mark.parametrize("dims, size", [(1, (16,)), (3, (2, 8, 8))])
def test_one_and_three_dimensions(dims, size):
    kwargs = ADM | {"dims": dims, "num_classes": None, "conv_resample": False, "resblock_updown": False}
    unet = fill(UNetModel(**kwargs)).eval()
    with torch.no_grad():
        assert unet(data("x", (2, 3, *size)), TIMESTEPS).shape == (2, 3, *size)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context_dim": None}, "use_spatial_transformer and context_dim"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"num_heads": 5}, "num_heads 5 does not divide"),
        ({"num_heads": -1, "num_head_channels": 24}, "num_head_channels 24 does not divide"),
        ({"model_channels": 40}, "multiple of 32"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        UNetModel(**SPATIAL | changes)


def test_labels_are_for_class_conditional_models():
    with pytest.raises(ValueError, match="num_classes"):
        spatial_unet()(data("x", (2, 4, 16, 16)), TIMESTEPS, y=torch.tensor([0, 1]))
