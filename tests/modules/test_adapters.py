import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.modules import adapters
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.openaimodel_inject import UNetModel_inject
from ldm.util import count_params
from tests.goldens.fill import data, fill
from tests.networks import ADM, GOLDENS, ROOT, SPATIAL, TIMESTEPS, relative_error, run, spatial_unet

CONFIGS = json.loads((GOLDENS / "adapters.json").read_text())["configs"]
OUTPUTS = np.load(GOLDENS / "adapters.npz")


def small_config(name, scale=0.7):
    """The named configuration at the size that the reference outputs were made with."""
    config = copy.deepcopy(CONFIGS[name]["adapter"])
    for entry in config.get("transformer_adp_config", []):
        entry |= {"mid_dim": 6, "scale": scale}
    if "resblock_adp_config" in config:
        config["resblock_adp_config"] |= {"mid_dim": 3, "scale": scale}
    return config


def inout(din="attn2o", dout="ffni", mid_dim=4, **more):
    return {"din": din, "dout": dout, "mid_dim": mid_dim, **more}


def perturb(unet, adapter_set=None):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(unet, adapter_set):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("name", [name for name in OUTPUTS.files if "|" not in name])
def test_reference_outputs(name):
    unet = fill(UNetModel_inject(adapter_config=small_config(name), **SPATIAL)).eval()
    assert relative_error(run(unet), OUTPUTS[name]) < 1e-4


def test_reference_output_when_switched_off():
    unet = fill(UNetModel_inject(adapter_config=small_config("attn2o-ffni"), **SPATIAL)).eval()
    unet.adapters_enable(False)
    assert relative_error(run(unet), OUTPUTS["attn2o-ffni|off"]) < 1e-4
    unet.adapters_enable(True)
    assert relative_error(run(unet), OUTPUTS["attn2o-ffni"]) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_trainable_and_does_something(name):
    unet = spatial_unet()
    base = run(unet)
    adapters.inject(unet, small_config(name))
    assert torch.equal(run(unet), base)
    perturb(unet)
    changed = run(unet)
    assert relative_error(changed, base) > 1e-3
    unet.adapters_enable(False)
    assert torch.equal(run(unet), base)


@pytest.fixture(scope="module")
def full_size():
    params = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params.unet_config.params
    with torch.device("meta"):
        return UNetModel(**params)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_at_full_size(full_size, name):
    adapters.inject(full_size, CONFIGS[name]["adapter"])
    count = sum(p.numel() for p in full_size.adapter_parameters())
    adapters.eject(full_size)
    assert count_params(full_size) == 859_520_964
    if "attn2c" in name:
        assert count == 16 * (2 * 768 * 60 + 768 + 60)
    elif name.startswith("res"):
        assert 3_200_000 < count < 3_400_000
    else:
        assert count == 1_511_040


transformer_entries = (
    st.sampled_from(adapters.FAMILIES[0].order)
    .flatmap(lambda din: st.tuples(st.just(din), st.sampled_from(adapters.FAMILIES[0].outputs_for(din))))
    .flatmap(
        lambda pair: st.fixed_dictionaries(
            {
                "din": st.just(pair[0]),
                "dout": st.just(pair[1]),
                "mid_dim": st.integers(1, 9),
                "method": st.sampled_from(list(adapters.ACTIVATIONS)),
                "scale": st.floats(-3, 3),
            }
        )
    )
)
residual_entries = st.sampled_from([("resi", "resi"), ("resi", "reso"), ("reso", "reso")]).map(
    lambda pair: inout(*pair)
)
configs = st.fixed_dictionaries(
    {
        "transformer_adp_config": st.lists(transformer_entries, min_size=1, max_size=3),
        "resblock_adp_config": st.lists(residual_entries, max_size=2),
    }
)


@given(configs)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_new_adapters_change_nothing_and_ejecting_restores(config):
    unet = UNIT
    base, keys = run(unet), list(unet.state_dict())
    adapters.inject(unet, config)
    try:
        assert torch.equal(run(unet), base)
        perturb(unet)
        run(unet)
    finally:
        adapters.eject(unet)
    assert torch.equal(run(unet), base)
    assert list(unet.state_dict()) == keys


UNIT = spatial_unet()


def test_an_adapter_reads_before_any_adapter_adds():
    together, alone = spatial_unet(), spatial_unet()
    entries = [inout("ffni", "ffni"), inout("ffni", "transo")]
    adapters.inject(together, {"transformer_adp_config": entries})
    perturb(together)
    block = together.input_blocks[1][1].transformer_blocks[0]
    at = block.announcer()
    value = data("ffni", (1, 4, 32))
    with torch.no_grad():
        added = at("ffni", value)
        assert torch.equal(added, value + block.adapter_inout(value))
        assert torch.equal(at("transo", added), added + block.adapter_inout_1(value))
    assert alone.input_blocks[1][1].transformer_blocks[0].announcer()("ffni", value) is value


def test_a_list_puts_several_into_each_block():
    unet = spatial_unet()
    adapters.inject(unet, {"transformer_adp_config": [inout(), inout("attn1i", "transo"), inout()]})
    names = {name.rpartition(".")[2] for name in adapters.find(unet)}
    assert names == {"adapter_inout", "adapter_inout_1", "adapter_inout_2"}
    assert all(adapters.is_adapter_key(name + ".adp.0.weight") for name in adapters.find(unet))


def test_base_keys_are_not_adapter_keys():
    assert not any(adapters.is_adapter_key(key) for key in spatial_unet().state_dict())


def test_methods_are_the_activations():
    value = data("act", (2, 3, 32))
    for method, expected in {
        "default": torch.relu,
        "relu": torch.relu,
        "sig": torch.sigmoid,
        "silu": torch.nn.functional.silu,
        "ident": torch.nn.Identity(),
    }.items():
        [spec] = adapters.parse_config({"transformer_adp_config": inout(method=method, init="default")})
        layer = adapters.TransformerAdapter(spec, 32, 32)
        assert torch.equal(layer(value), layer.adp[2](expected(layer.adp[0](value))))


def test_scale_and_strength_multiply_what_is_added():
    unet = spatial_unet()
    base = run(unet)
    adapters.inject(unet, {"transformer_adp_config": inout("transo", "transo", scale=0.5)})
    perturb(unet)
    value = data("value", (1, 4, 32))
    block = unet.input_blocks[1][1].transformer_blocks[0]
    adapters.set_scale(unet, 3.0)
    with torch.no_grad():
        added = block.announcer()("transo", value) - value
        torch.testing.assert_close(added, 1.5 * block.adapter_inout(value))
    adapters.set_scale(unet, 0.0)
    assert torch.equal(run(unet), base)


def test_several_sets_are_independent():
    unet = spatial_unet()
    base = run(unet)
    adapters.inject(unet, small_config("attn2o-ffni"), "dog")
    perturb(unet)
    dog = run(unet)
    adapters.inject(unet, small_config("attn2o-ffni"), "cat")
    assert torch.equal(run(unet), dog)
    perturb(unet, "cat")
    assert not torch.equal(run(unet), dog)
    adapters.set_scale(unet, 0.0, "cat")
    assert torch.equal(run(unet), dog)
    adapters.eject(unet, "dog")
    assert torch.equal(run(unet), base)
    with pytest.raises(UserError, match="'cat' is already injected"):
        adapters.inject(unet, small_config("attn2o-ffni"), "cat")


def test_init_default_is_no_identity():
    unet = spatial_unet()
    base = run(unet)
    adapters.inject(unet, {"transformer_adp_config": inout(init="default")})
    assert not torch.equal(run(unet), base)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("name", ["attn2o-ffni", "attn1i-attn1i", "attn2c-attn2c", "resi-reso", "reso-reso"])
def test_gradients_reach_adapters_over_a_frozen_base(name, use_checkpoint):
    unet = spatial_unet(use_checkpoint=use_checkpoint).requires_grad_(False)
    adapters.inject(unet, small_config(name))
    perturb(unet)
    unet(data("x", (2, 4, 16, 16)), TIMESTEPS, data("c", (2, 5, 24))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.adapter_parameters())
    assert all((p.grad is None) != adapters.is_adapter_key(key) for key, p in unet.named_parameters())


def test_a_copy_has_its_own_adapters():
    unet = spatial_unet()
    adapters.inject(unet, small_config("attn2o-ffni"))
    twin = copy.deepcopy(unet)
    perturb(twin)
    assert not torch.equal(run(twin), run(unet))


def test_adapters_take_the_dtype_of_their_block():
    unet = spatial_unet().bfloat16()
    adapters.inject(unet, small_config("resi-reso") | small_config("attn2o-ffni"))
    assert {p.dtype for p in unet.adapter_parameters()} == {torch.bfloat16}
    assert run(unet).isfinite().all()


def test_resampling_blocks_take_none():
    unet = UNetModel(**ADM)
    adapters.inject(unet, {"resblock_adp_config": inout("resi", "reso")})
    takers = {name.rpartition(".")[0] for name in adapters.find(unet)}
    assert "input_blocks.1.0" in takers and "input_blocks.3.0" not in takers


TRANSFORMER = "adapter_config.transformer_adp_config"


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "adapter_config holds None; it must hold transformer_adp_config, resblock_adp_config"),
        ({}, "adapter_config holds {}"),
        ({"transformer_adp_config": []}, "adapter_config holds"),
        ({"lora_config": [inout()]}, "adapter_config.lora_config is unknown; the keys are"),
        ({"transformer_adp_config": ["attn1i"]}, rf"{TRANSFORMER}\[0\] holds 'attn1i'; it must be a mapping"),
        ({"transformer_adp_config": inout(din="attn3")}, f"{TRANSFORMER}.din holds 'attn3'.*attn1i, attn1o"),
        ({"transformer_adp_config": [inout(), inout(dout="ffno")]}, r"\[1\].dout holds 'ffno'.*ffni, transo"),
        ({"transformer_adp_config": inout(din="transo", dout="ffni")}, "dout holds 'ffni'; with din transo"),
        ({"transformer_adp_config": inout(din="attn2c")}, "with din attn2c it must be one of attn2c$"),
        ({"transformer_adp_config": inout(din="resi")}, "din holds 'resi'"),
        ({"transformer_adp_config": inout(mid_dim=0)}, f"{TRANSFORMER}.mid_dim holds 0; .* at least 1"),
        ({"transformer_adp_config": inout(mid_dim="60")}, "mid_dim holds '60'"),
        ({"transformer_adp_config": inout(scale="big")}, "scale holds 'big'"),
        (
            {"transformer_adp_config": inout(method="tanh")},
            "method holds 'tanh'.*default, relu, sig, silu, ident",
        ),
        ({"transformer_adp_config": inout(type="lora")}, "type holds 'lora'; it must be one of inout"),
        (
            {"transformer_adp_config": inout(init="ones")},
            "init holds 'ones'; it must be one of zero, default",
        ),
        ({"transformer_adp_config": inout(width=3)}, f"{TRANSFORMER}.width is unknown"),
        ({"transformer_adp_config": {"din": "ffni", "mid_dim": 3}}, f"{TRANSFORMER}.dout is missing"),
        ({"resblock_adp_config": inout("reso", "resi")}, "resblock_adp_config.dout holds 'resi'.*reso"),
    ],
)
def test_what_is_wrong_in_the_yaml_is_named(config, message):
    unet = spatial_unet()
    before = list(unet.state_dict())
    with pytest.raises(UserError, match=message):
        adapters.inject(unet, OmegaConf.create(config) if config else config)
    assert list(unet.state_dict()) == before


def test_a_network_without_the_position_is_refused():
    with pytest.raises(UserError, match="'attn2o' does not exist in this U-Net"):
        adapters.inject(UNetModel(**ADM), {"transformer_adp_config": inout()})
