"""The best step: the most similar of those that drift little; judged by the tiny world or by a vision network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.best_step import BestStepConfig, Score, best_of, keep_best
from ldm.data.shapes import PAIRS
from ldm.data.subjects import subject_views
from ldm.errors import UserError
from ldm.evaluation.judges import TINY_WORLD, judge_of
from tests.pipelines import shake


def test_the_most_similar_of_those_that_drift_little_is_best() -> None:
    scores = [Score(10, 0.5, 0.0), Score(20, 0.8, 0.05), Score(30, 0.9, 0.06), Score(40, 0.8, 0.0)]
    assert best_of(scores, 0.05).step == 20
    assert best_of(scores, 0.06).step == 30
    assert best_of(scores[2:3] + [Score(50, 0.95, 0.2)], 0.05).step == 30


def test_what_is_kept_as_best_is_that_steps(tmp_path: Path) -> None:
    for step in (4, 14):
        (tmp_path / f"{step}-adapters").mkdir()
        (tmp_path / f"{step}-adapters" / "x.pt").write_text(str(step))
        (tmp_path / f"{step}-lora.safetensors").write_text(str(step))
        keep_best(tmp_path, step)
        found = [tmp_path / "best-adapters" / "x.pt", tmp_path / "best-lora.safetensors"]
        assert [path.read_text() for path in found] == [str(step)] * 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_tiny_world_judges_by_its_own_features() -> None:
    judge = judge_of(TINY_WORLD)
    balls, houses = subject_views("ball", 3), subject_views("house", 3)
    assert judge.similarity(balls, balls) > judge.similarity(houses, balls) + 0.2
    prompts = judge.other_prompts(4)
    assert len(prompts) == 4 and all(any(shape in text for shape, _ in PAIRS) for text in prompts)
    assert judge.drift(balls, balls, judge.other_prompts(3)) == 0
    assert judge.subject_prompts("toy", 2, "<x>")[0] == "a photo of a <x> toy"


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_a_vision_network_judges_by_its_features(kind: str, tmp_path: Path) -> None:
    import transformers

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**sizes, patch_size=8, projection_dim=12)
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, patch_size=8))
    shake(model)
    model.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor if kind == "clip" else transformers.ViTImageProcessor
    processor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path)
    judge = judge_of(str(tmp_path))
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    assert judge.similarity([red, blue], [red]) < judge.similarity([red], [red]) == pytest.approx(1, abs=1e-5)
    assert judge.drift([red, blue], [red, blue], ["", ""]) == pytest.approx(0, abs=1e-5)
    assert judge.drift([red], [blue], [""]) > 1e-5


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'other' is none of features, subject"):
        BestStepConfig.read({"features": TINY_WORLD, "other": 3})
    with pytest.raises(UserError, match="features is missing"):
        BestStepConfig.read({"subject": 3})
    with pytest.raises(UserError, match="neither tiny-world nor"):
        judge_of(str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [{"subject": 0}, {"others": 0}, {"others": 2.5}, {"steps": "x"}, {"steps": True}, {"steps": None}, {"scale": "x"},
     {"scale": float("nan")}, {"scale": None}, {"most_drift": float("inf")}, {"features": 3}],
)  # fmt: skip
def test_values_that_cannot_be_are_named(wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"yaml: lightning\.best_step\.{name} is {value!r}; it must be"):
        BestStepConfig.read({"features": TINY_WORLD, **wrong})


def test_values_that_can_be_are_read() -> None:
    read = BestStepConfig.read({"features": TINY_WORLD, "others": 1, "scale": 3, "most_drift": None})
    assert (read.others, read.scale, read.most_drift) == (1, 3, None)
    assert BestStepConfig.read({"features": TINY_WORLD, "most_drift": 0.1}).most_drift == 0.1
