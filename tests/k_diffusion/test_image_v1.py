"""The image U-Net: names, shapes, and what it computes, against PyTorch's own modules and formulas by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.k_diffusion.models.image_v1 import ImageDenoiserModelV1
from ldm.k_diffusion.models.layers import (
    AdaGN,
    Condition,
    CrossAttention2d,
    Downsample2d,
    FourierFeatures,
    SelfAttention2d,
    Upsample2d,
)
from tests.goldens.fill import data, fill

SMALL = dict(c_in=3, feats_in=16, depths=[1, 2], channels=[32, 64], self_attn_depths=[False, True])


def condition(batch=2, **more):
    return Condition(data("mapped", (batch, 16)), **more)


def test_names_and_shapes_are_k_diffusions():
    state = ImageDenoiserModelV1(**SMALL, mapping_cond_dim=9, has_variance=True).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {
        "timestep_embed.weight": (8, 1),
        "mapping_cond.weight": (16, 9),
        "mapping.0.weight": (16, 16), "mapping.0.bias": (16,), "mapping.2.weight": (16, 16), "mapping.2.bias": (16,),
        "proj_in.weight": (32, 3, 1, 1), "proj_in.bias": (32,), "proj_out.weight": (4, 32, 1, 1), "proj_out.bias": (4,),
    }  # fmt: skip

    def residual(name, c_in, c_mid, c_out):
        for place, channels in ((0, c_in), (4, c_mid)):
            expected[f"{name}.main.{place}.mapper.weight"] = (2 * channels, 16)
            expected[f"{name}.main.{place}.mapper.bias"] = (2 * channels,)
        for place, (before, after) in ((2, (c_in, c_mid)), (6, (c_mid, c_out))):
            expected[f"{name}.main.{place}.weight"] = (after, before, 3, 3)
            expected[f"{name}.main.{place}.bias"] = (after,)
        if c_in != c_out:
            expected[f"{name}.skip.weight"] = (c_out, c_in, 1, 1)

    def attention(name, channels):
        for part, shape in (("norm_in.mapper", (2 * channels, 16)), ("qkv_proj", (3 * channels, channels, 1, 1)),
                            ("out_proj", (channels, channels, 1, 1))):  # fmt: skip
            expected[f"{name}.{part}.weight"], expected[f"{name}.{part}.bias"] = shape, shape[:1]

    residual("u_net.d_blocks.0.1", 32, 32, 32)
    expected["u_net.d_blocks.1.0.kernel"] = expected["u_net.u_blocks.0.4.kernel"] = (4, 4)
    residual("u_net.d_blocks.1.1", 32, 64, 64)
    attention("u_net.d_blocks.1.2", 64)
    residual("u_net.d_blocks.1.3", 64, 64, 64)
    attention("u_net.d_blocks.1.4", 64)
    residual("u_net.u_blocks.0.0", 64, 64, 64)
    attention("u_net.u_blocks.0.1", 64)
    residual("u_net.u_blocks.0.2", 64, 64, 32)
    attention("u_net.u_blocks.0.3", 32)
    residual("u_net.u_blocks.1.0", 64, 32, 32)
    assert shapes == expected


def test_cross_attention_has_k_diffusions_names():
    network = ImageDenoiserModelV1(**SMALL, cross_attn_depths=[False, True], cross_cond_dim=12)
    found = {key for key in network.state_dict() if key.startswith("u_net.d_blocks.1.3.")}
    parts = ("norm_enc", "norm_dec.mapper", "q_proj", "kv_proj", "out_proj")
    assert found == {f"u_net.d_blocks.1.3.{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_an_untrained_network_gives_zero():
    network, x = ImageDenoiserModelV1(**SMALL, has_variance=True), torch.randn(2, 3, 8, 8)
    output, logvar = network(x, torch.tensor([0.1, 7.0]), return_variance=True)
    assert output.shape == x.shape and logvar.shape == (2,)
    assert not output.any() and not logvar.any()


def test_down_and_upsampling_keep_constants_and_filter_as_said():
    x = torch.arange(8.0).expand(1, 2, 8, 8)  # a ramp, which a symmetric filter keeps
    down, up = Downsample2d()(x), Upsample2d()(x)
    assert down.shape == (1, 2, 4, 4) and up.shape == (1, 2, 16, 16)
    torch.testing.assert_close(down[0, 0, 0, 1:3], torch.tensor([2.5, 4.5]))
    torch.testing.assert_close(up[0, 0, 8, 4:12], torch.arange(8) / 2 + 1.75)
    for layer in (Downsample2d(), Upsample2d()):
        torch.testing.assert_close(layer(torch.ones(1, 3, 8, 8)), torch.ones_like(layer(torch.ones(1, 3, 8, 8))))
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    padded = F.pad(data("x", (1, 1, 8, 8)), (1, 1, 1, 1), "reflect")
    by_hand = (padded[0, 0, 2:6, 4:8] * taps[:, None] * taps).sum()  # row 1, column 2 of the result
    torch.testing.assert_close(Downsample2d()(data("x", (1, 1, 8, 8)))[0, 0, 1, 2], by_hand)


def test_normalisation_is_scaled_and_shifted_by_the_condition():
    layer, x, c = fill(AdaGN(16, 8, 2)), data("x", (2, 8, 4, 4)), condition()
    scale, shift = (c.mapped @ layer.mapper.weight.T + layer.mapper.bias).chunk(2, dim=1)
    expected = torch.nn.GroupNorm(2, 8, affine=False)(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(layer(x, c), expected)


def test_self_attention_is_torchs_multi_head_attention():
    layer, x, c = fill(SelfAttention2d(8, 2, AdaGN(16, 8, 1))), data("x", (2, 8, 4, 4)), condition()
    tokens = layer.norm_in(x, c).flatten(2).transpose(1, 2)
    weights = [layer.qkv_proj.weight[..., 0, 0], layer.qkv_proj.bias, layer.out_proj.weight[..., 0, 0]]
    expected, _ = F.multi_head_attention_forward(
        *[tokens.transpose(0, 1)] * 3, 8, 2, *weights[:2], None, None, False, 0.0, weights[2], layer.out_proj.bias
    )
    torch.testing.assert_close(layer(x, c), x + expected.permute(1, 2, 0).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_cross_attention_is_torchs_and_ignores_padding():
    layer, x = fill(CrossAttention2d(8, 6, 2, AdaGN(16, 8, 1))), data("x", (2, 8, 4, 4))
    tokens = data("tokens", (2, 5, 6))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    c = condition(cross=tokens, padding=padding)
    query = layer.norm_dec(x, c).flatten(2).permute(2, 0, 1)
    key = layer.norm_enc(tokens).transpose(0, 1)
    k, v = layer.kv_proj.weight.chunk(2)
    bias = torch.cat([layer.q_proj.bias, layer.kv_proj.bias])
    expected, _ = F.multi_head_attention_forward(
        query, key, key, 8, 2, None, bias, None, None, False, 0.0, layer.out_proj.weight[..., 0, 0],
        layer.out_proj.bias, key_padding_mask=padding, use_separate_proj_weight=True,
        q_proj_weight=layer.q_proj.weight[..., 0, 0], k_proj_weight=k, v_proj_weight=v,
    )  # fmt: skip
    torch.testing.assert_close(layer(x, c), x + expected.permute(1, 2, 0).reshape(x.shape), rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[1, 3:] = 9.0
    torch.testing.assert_close(layer(x, condition(cross=changed, padding=padding)), layer(x, c))


def test_the_noise_level_reaches_the_network_as_its_logarithm():
    network = fill(ImageDenoiserModelV1(**SMALL, mapping_cond_dim=4)).eval()
    seen = []
    network.mapping.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sigma, more = torch.tensor([0.3, 20.0]), data("more", (2, 4))
    network(data("x", (2, 3, 8, 8)), sigma, mapping_cond=more)
    angles = 2 * math.pi * (sigma.log() / 4)[:, None] * network.timestep_embed.weight[:, 0]
    expected = torch.cat([angles.cos(), angles.sin()], dim=1) + more @ network.mapping_cond.weight.T
    torch.testing.assert_close(seen[0], expected)


def test_patches_are_worked_on_as_channels():
    patched = fill(ImageDenoiserModelV1(**SMALL, patch_size=2)).eval()
    plain = ImageDenoiserModelV1(**SMALL | {"c_in": 12}).eval()
    plain.load_state_dict(patched.state_dict())
    x, sigma = data("x", (2, 3, 16, 16)), torch.tensor([0.3, 20.0])
    torch.testing.assert_close(patched(x, sigma), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), sigma), 2))


def test_skipped_levels_take_no_part_and_are_not_trained():
    settings = SMALL | {"depths": [1, 1, 1], "channels": [32, 32, 64], "self_attn_depths": [False] * 3}
    network = fill(ImageDenoiserModelV1(**settings, skip_stages=1)).eval()
    inner = ImageDenoiserModelV1(**settings | {"depths": [1, 1], "channels": [32, 64], "self_attn_depths": [False] * 2})
    state = network.state_dict()
    renamed = {key.replace("d_blocks.1.", "d_blocks.0.").replace("d_blocks.2.", "d_blocks.1."): value
               for key, value in state.items() if "d_blocks.0" not in key and "u_blocks.2" not in key}  # fmt: skip
    inner.load_state_dict(renamed)
    x, sigma = data("x", (2, 3, 8, 8)), torch.tensor([0.3, 20.0])
    torch.testing.assert_close(network(x, sigma), inner.eval()(x, sigma))
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("d_blocks.0." not in name and "u_blocks.2." not in name)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for use_checkpoint in (False, True):
        network = fill(ImageDenoiserModelV1(**SMALL, use_checkpoint=use_checkpoint))
        network(data("x", (2, 3, 8, 8)), torch.tensor([0.3, 20.0])).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_decay_only_where_they_multiply():
    network = ImageDenoiserModelV1(**SMALL, mapping_cond_dim=9)
    decayed, others = network.param_groups()
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in others} >= {"proj_in.weight", "proj_out.weight", "mapping.0.bias"}
    assert {"mapping_cond.weight", "mapping.0.weight", "u_net.d_blocks.0.1.main.0.mapper.weight"} <= {
        names[id(p)] for p in decayed
    }
    assert len(decayed) + len(others) == len(names)


def test_fourier_features_are_not_trained():
    layer = FourierFeatures(1, 16)
    assert not list(layer.parameters()) and layer.weight.shape == (8, 1)


@pytest.mark.parametrize("change, said", [
    (dict(channels=[32]), "depths has 2, channels has 1"),
    (dict(skip_stages=2), "skip_stages is 2; there are 2 levels"),
    (dict(feats_in=15), "it must be even"),
    (dict(channels=[32, 100]), "channels has 100"),
])  # fmt: skip
def test_wrong_settings_are_said(change, said):
    with pytest.raises(UserError, match=said):
        ImageDenoiserModelV1(**SMALL | change)
