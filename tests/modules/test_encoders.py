"""Text encoder against transformers' own model; class labels and small images as conditions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.modules.encoders.modules import ClassEmbedder, FrozenCLIPEmbedder, SpatialRescaler
from ldm.util import UserError
from tests.goldens.fill import data, fill

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def small(**params: Any) -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(architecture=SMALL | params.pop("architecture", {}), **params)


@torch.no_grad()
def test_agrees_with_transformers() -> None:
    ours = fill(small())
    level = "" if "embeddings.token_embedding.weight" in ours.transformer.state_dict() else "text_model."
    peer = CLIPTextModel(CLIPTextConfig(**SMALL, hidden_act="quick_gelu")).eval()
    peer.load_state_dict(
        {k.replace("transformer.text_model.", level): v for k, v in ours.state_dict().items()}, strict=True
    )
    texts = ["a photo of a sks dog", "", "two words"]
    states = ours(texts)
    assert states.shape == (3, 77, 32)
    torch.testing.assert_close(states, peer(input_ids=ours.tokenize(texts)).last_hidden_state)
    assert torch.equal(ours.encode(texts), states) and torch.equal(ours("two words"), ours(["two words"]))


def test_tokens_are_padded_with_the_end_token_as_in_sd_v1() -> None:
    tokens = small().tokenize(["a photo of a sks dog", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.long
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 48136, 1929, 49407]
    assert tokens[1, 0] == 49406 and set(tokens[1, 1:].tolist()) == set(tokens[0, 7:].tolist()) == {49407}


def test_what_does_not_fit_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    ours = small()
    full = ours.tokenize([" ".join(["dog"] * 75)])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="75 tokens.*'Cat, and a Mouse'"):
        longer = ours.tokenize([" ".join(["dog"] * 75) + " Cat, and a Mouse"])
    assert torch.equal(full, longer) and longer[0, -1] == 49407


@pytest.mark.parametrize("prefix", ["", "cond_stage_model."])
def test_state_dict_has_sd_v1_keys_and_takes_every_layout(prefix: str) -> None:
    """SD v1's keys, with `position_ids` as old checkpoints have it, and transformers' own without a level."""
    module = torch.nn.ModuleDict({"cond_stage_model": small()}) if prefix else small()
    state = fill(module).state_dict()
    root = f"{prefix}transformer."
    assert len(state) == 4 + 2 * 16 and all(key.startswith(f"{root}text_model.") for key in state)
    old = state | {f"{root}text_model.embeddings.position_ids": torch.arange(77)[None]}
    flat = {key.replace("text_model.", ""): value for key, value in state.items()}
    for layout in (state, old, flat):
        other = torch.nn.ModuleDict({"cond_stage_model": small()}) if prefix else small()
        other.load_state_dict(layout)
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_sd_v1_sizes_when_none_are_given() -> None:
    with torch.device("meta"):
        ours = FrozenCLIPEmbedder(device="meta")
    state = ours.state_dict()
    assert sum(value.numel() for value in state.values()) == 123_060_480 and len(state) == 196
    assert state["transformer.text_model.embeddings.position_embedding.weight"].shape == (77, 768)
    assert state["transformer.text_model.encoder.layers.11.mlp.fc1.weight"].shape == (3072, 768)
    assert ours.transformer.config.hidden_act == "quick_gelu"


def test_frozen_unless_told_otherwise() -> None:
    frozen, free = small(), small(freeze=False)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    free(["a dog"]).sum().backward()
    assert all(p.grad is not None for p in free.parameters())


def test_wrong_architectures_are_named() -> None:
    for params, name in (
        ({"architecture": {"width": 3}}, "width"),
        ({"architecture": {"num_attention_heads": 5}}, "num_attention_heads"),
        ({"architecture": {"max_position_embeddings": 10}}, "max_position_embeddings"),
    ):
        with pytest.raises(UserError, match=name):
            small(**params)
    with pytest.raises(UserError, match="some/other"):
        FrozenCLIPEmbedder(version="some/other")


def test_class_embedder() -> None:
    ours = ClassEmbedder(embed_dim=5, n_classes=7, key="label")
    labels = torch.tensor([3, 6])
    embedded = ours({"label": labels})
    assert embedded.shape == (2, 1, 5) and torch.equal(embedded[:, 0], ours.embedding.weight[labels])
    assert torch.equal(embedded, ours(labels)) and torch.equal(embedded, ours({"other": labels}, key="other"))
    assert list(ours.state_dict()) == ["embedding.weight"]


def test_spatial_rescaler() -> None:
    x = data("rescale", (2, 3, 16, 16))
    halves = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(SpatialRescaler(method="area")(x), halves)
    torch.testing.assert_close(
        SpatialRescaler(n_stages=2, method="area").encode(x), torch.nn.functional.avg_pool2d(x, 4)
    )
    mapped = SpatialRescaler(in_channels=3, out_channels=4)
    assert mapped(x).shape == (2, 4, 8, 8) and list(mapped.state_dict()) == ["channel_mapper.weight"]
    with pytest.raises(UserError, match="lanczos"):
        SpatialRescaler(method="lanczos")
