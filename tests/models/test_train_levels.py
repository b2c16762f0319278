"""What each level of personalisation trains, leaves behind, and is when it is put into the base model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm import artefacts, training_results
from ldm.models.diffusion.ddpm_dream import level_of
from ldm.modules.randomness import SampleRandom
from ldm.util import UserError
from tests.goldens.fill import data
from tests.models.test_ddpm_dream import dream, pair
from tests.networks import relative_error

WORD = {
    "target": "ldm.modules.embedding_manager.EmbeddingManager",
    "params": {"placeholder_strings": ["<toy>"], "initializer_words": ["toy"], "num_vectors_per_token": 2},
}
LORA = {"rank": 2, "alpha": 1, "targets": ["to_q", "to_v", "proj_in"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"train_level": ["lora"], "lora_config": LORA},
    "lora-text": {"train_level": ["lora"], "lora_config": {**LORA, "text_targets": ["q_proj", "fc2"]}},
    "embedding": {"train_level": ["embeder"], "personalization_config": WORD},
    "pivotal": {"train_level": ["embeder", "lora"], "lora_config": LORA, "personalization_config": WORD,
                "lr_factors": {"embeder": 3.0}},
    "text": {"train_level": ["text"]},
    "unet-text": {"train_level": ["unet", "text"]},
    "adapter-lora": {"train_level": ["adapter", "lora"], "lora_config": LORA},
}  # fmt: skip
LEFT = {"lora": ["lora.safetensors"], "lora-text": ["lora.safetensors"], "embedding": ["embedding.safetensors"],
        "pivotal": ["embedding.safetensors", "lora.safetensors"], "text": ["weights.safetensors"],
        "unet-text": ["weights.safetensors"], "adapter-lora": ["adapters", "lora.safetensors"]}  # fmt: skip


def filled(name: str) -> Any:
    """A model of one of `SETTINGS` with weights that are random, and the same for all."""
    settings = SETTINGS[name]
    adapted = "adapter" in settings["train_level"]
    model = dream(**settings) if adapted else dream(adapters=None, **settings)
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.nn.Parameter) and level_of(key) in ("unet", "text") and value.ndim > 1:
            value.data = data(key, tuple(value.shape), 0.1)
    return model


def batch() -> dict:
    both = pair()
    both["instance"]["caption"] = ["a photo of a <toy> toy"] * 2
    return both


def trained(name: str) -> Any:
    """A model after two steps."""
    model = filled(name)
    model.prepare()
    model.train()
    model.learning_rate = 0.05
    optimizer = model.make_optimizer(fused=False)
    for step in range(2):
        loss, _ = model.shared_step(batch(), SampleRandom(0, step, 0, 5, "cpu"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def predictions(model: Any) -> torch.Tensor:
    model.eval()
    c = model.get_learned_conditioning(["a photo of a <toy> toy", "a photo of a toy"])
    return model.apply_model(data("x", (2, 4, 8, 8)), torch.tensor([5, 700]), c)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_level_leaves_behind_makes_the_base_model_the_trained_one(name: str, tmp_path: Path) -> None:
    model, base = trained(name), filled("text")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    untrained = filled(name).state_dict()
    now = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    changed = {level_of(k) for k in now if k not in untrained or not torch.equal(now[k], untrained[k])}
    assert changed == set(SETTINGS[name]["train_level"])
    written = training_results.save(model, tmp_path, "2", {"class_word": "toy", "steps": 2, "trigger": "a <toy>"})
    assert sorted(path.name for path in written.values()) == [f"2-{ending}" for ending in LEFT[name]]
    assert {artefacts.look(path).trigger for path in written.values()} == {"a <toy>"}
    theirs, plain = predictions(model), predictions(base)
    artefacts.use(base, dict.fromkeys(written.values(), 1.0))
    assert relative_error(predictions(base), theirs) < 1e-4 < 1e-3 < relative_error(plain, theirs)
    artefacts.use(base, {})
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", ["lora-text", "pivotal", "text"])
def test_checkpoints_hold_what_is_trained_and_bring_it_back(name: str) -> None:
    model = trained(name)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert {level_of(key) for key in checkpoint["state_dict"]} == set(SETTINGS[name]["train_level"])
    again = filled(name)
    again.prepare()
    again.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    assert torch.equal(predictions(again), predictions(model))


def test_a_new_word_starts_as_its_initialiser_and_only_its_captions_are_encoded_again() -> None:
    model = filled("embedding")
    model.prepare()
    assert torch.equal(*model.get_learned_conditioning(["a <toy>", "a toy toy"]).split(1))
    calls: list[int] = []
    model.cond_stage_model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        model.get_learned_conditioning(["a <TOY>", "a house"])
    assert len(calls) == 4
    assert model.get_learned_conditioning(["a <toy>"]).requires_grad
    assert not model.get_learned_conditioning(["a house"]).requires_grad


def test_levels_have_their_own_learning_rates() -> None:
    model = filled("pivotal")
    model.prepare()
    model.learning_rate = 0.1
    rates = {round(group["lr"], 6): len(group["params"]) for group in model.make_optimizer(fused=False).param_groups}
    assert rates[0.3] == 1 and rates[0.1] > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_level": ["lora", "unet"]}, "leave unet out"),
        ({"train_level": ["lora"], "lora_config": {"alpha": 0}}, "alpha is 0"),
        ({"train_level": ["lora"], "lora_config": {"rnk": 3}}, "'rnk' is none of rank"),
        ({"train_level": ["text", "lora"], "lora_config": {"text_targets": ["q_proj"]}}, "text_targets"),
        ({"lr_factors": {"lora": -1}}, "lr_factors holds lora"),
        ({"optimizer": "sgd"}, "adamw, adamw8bit"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dream(**OmegaConf.create(settings))


def test_eight_bit_adam_needs_its_package_and_says_so() -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            dream(optimizer="adamw8bit")
    else:
        assert type(dream(optimizer="adamw8bit").make_optimizer(False)).__name__ == "AdamW8bit"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"placeholder_strings": ["a b"]}, "cannot be a new word"),
        ({"num_vectors_per_token": 0}, "num_vectors_per_token"),
        ({"per_image_tokens": True}, "per_image_tokens"),
        ({"placeholder_strings": ["<a>", "<A>"]}, "there already"),
    ],
)
def test_wrong_words_are_named(params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dream(adapters=None, train_level=["embeder"], personalization_config={**WORD, "params": params})
