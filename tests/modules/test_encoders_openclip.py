"""Stable Diffusion v2's text encoder and CLIP's image encoder, against open_clip and transformers themselves."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenOpenCLIPEmbedder
from ldm.util import UserError
from tests.goldens.fill import data, fill

SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 32, "heads": 4, "layers": 3},
}
TEXTS = ["a photo of a sks dog", "", "two words"]


def small(**params: Any) -> FrozenOpenCLIPEmbedder:
    return fill(FrozenOpenCLIPEmbedder(**{"architecture": SMALL} | params))


@torch.no_grad()
def test_last_layer_agrees_with_open_clip() -> None:
    ours, peer = small(), open_clip.CLIP(**SMALL).eval()
    state = {key.removeprefix("model."): value for key, value in ours.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith("visual.") for key in missing)
    seen = []
    peer.ln_final.register_forward_hook(lambda module, inputs, output: seen.append(output))
    peer.encode_text(ours.tokenize(TEXTS))
    states = ours(TEXTS)
    assert states.shape == (3, 77, 32)
    torch.testing.assert_close(states, seen[0])
    assert torch.equal(ours.encode(TEXTS), states) and torch.equal(ours("two words"), ours(["two words"]))


@torch.no_grad()
def test_penultimate_layer_agrees_with_transformers() -> None:
    """Stable Diffusion v2 in diffusers is CLIPTextModel with one layer less."""
    ours = small(layer="penultimate")
    state = ours.state_dict()
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    peer = CLIPTextModel(CLIPTextConfig(**config, hidden_act="gelu", vocab_size=49408)).eval()
    named = {
        "embeddings.token_embedding.weight": state["model.token_embedding.weight"],
        "embeddings.position_embedding.weight": state["model.positional_embedding"],
        "final_layer_norm.weight": state["model.ln_final.weight"],
        "final_layer_norm.bias": state["model.ln_final.bias"],
    }
    names = {"out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "mlp.c_fc"}
    for i in range(2):
        theirs, mine = f"encoder.layers.{i}", f"model.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for name, value in zip("qkv", state[f"{mine}.attn.in_proj_{kind}"].chunk(3), strict=True):
                named[f"{theirs}.self_attn.{name}_proj.{kind}"] = value
            named[f"{theirs}.mlp.fc2.{kind}"] = state[f"{mine}.mlp.c_proj.{kind}"]
            for name, own in names.items():
                level = {"out_proj": "self_attn.", "fc1": "mlp."}.get(name, "")
                named[f"{theirs}.{level}{name}.{kind}"] = state[f"{mine}.{own}.{kind}"]
    prefix = "text_model." if next(iter(peer.state_dict())).startswith("text_model.") else ""
    peer.load_state_dict({prefix + key: value for key, value in named.items()})
    expected = peer(input_ids=ours.tokenize(TEXTS)).last_hidden_state
    torch.testing.assert_close(ours(TEXTS), expected)
    assert (small()(TEXTS) - expected).abs().max() > 0.1


def test_tokens_are_open_clips() -> None:
    texts = ["A photo of a  SKS dog!", "", "naïve café, 3 km/h", "emoji 🐶 don't"]
    tokens = small().tokenize(texts)
    assert torch.equal(tokens, open_clip.tokenize(texts))
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 48136, 1929, 256]
    assert tokens[1].tolist() == [49406, 49407] + [0] * 75


def test_what_does_not_fit_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    full = " ".join(["dog"] * 75)
    tokens = small().tokenize([full])
    assert not recwarn.list and tokens[0, -1] == 49407
    with pytest.warns(UserWarning, match="75 tokens.*'Cat, and a Mouse'"):
        assert torch.equal(small().tokenize([full + " Cat, and a Mouse"]), tokens)


def test_sd_v2_sizes_and_names_when_none_are_given() -> None:
    with torch.device("meta"):
        ours = FrozenOpenCLIPEmbedder(layer="penultimate")
    state = ours.state_dict()
    assert sum(value.numel() for value in state.values()) == 354_032_641 and len(state) == 24 * 12 + 6
    assert state["model.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    assert state["model.positional_embedding"].shape == (77, 1024)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training


@pytest.mark.parametrize("prefix", ["", "cond_stage_model."])
def test_weights_that_no_picture_needs_may_be_missing(prefix: str) -> None:
    def module() -> torch.nn.Module:
        ours = FrozenOpenCLIPEmbedder(architecture=SMALL)
        return torch.nn.ModuleDict({"cond_stage_model": ours}) if prefix else ours

    state = dict(fill(module()).state_dict())
    for name in ("logit_scale", "text_projection"):
        del state[f"{prefix}model.{name}"]
    other = module()
    other.load_state_dict(state | {f"{prefix}model.attn_mask": torch.zeros(77, 77)})
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items() if key in state)
    del state[f"{prefix}model.ln_final.bias"]
    with pytest.raises(RuntimeError, match="ln_final.bias"):
        other.load_state_dict(state)


def test_wrong_settings_are_named() -> None:
    for params, name in (
        ({"layer": "first"}, "layer: 'first'"),
        ({"arch": "ViT-X", "architecture": None}, "ViT-X"),
        ({"max_length": 80}, "max_length 80"),
        ({"architecture": {"text_cfg": {}}}, "embed_dim"),
        ({"architecture": {"embed_dim": 8, "text_cfg": {"wide": 3}}}, "text_cfg.wide"),
        ({"architecture": {"embed_dim": 8, "text_cfg": {"width": 30, "heads": 4}}}, "heads"),
    ):
        with pytest.raises(UserError, match=name):
            small(**params)
    with pytest.raises(UserError, match="ViT-X-1"):
        FrozenClipImageEmbedder(model="ViT-X-1")
    with pytest.raises(UserError, match="tower"):
        FrozenClipImageEmbedder(architecture=SMALL | {"tower": 3})


@torch.no_grad()
def test_image_embeddings_agree_with_open_clip() -> None:
    ours = fill(FrozenClipImageEmbedder(architecture=SMALL))
    assert set(ours.state_dict()) == {f"model.{key}" for key in open_clip.CLIP(**SMALL).state_dict()}
    images = data("clipx", (2, 3, 40, 56), 0.4).clamp(-1, 1)
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", align_corners=True)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    expected = ours.model.encode_image(((resized + 1) / 2 - mean) / std)
    embeddings = ours(images)
    assert embeddings.shape == (2, 24)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.encode(images), embeddings[:, None])


def test_image_encoder_has_openai_sizes_under_openai_names() -> None:
    with torch.device("meta"):
        ours = FrozenClipImageEmbedder("ViT-B/32")
    assert ours.model.visual.conv1.weight.shape == (768, 3, 32, 32)
    assert type(ours.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
