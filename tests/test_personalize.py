"""A personalisation from Python, from photos to a model that knows them: prior images, training, best step, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm import artefacts
from ldm.data.subjects import write_subject_photos
from ldm.errors import UserError
from ldm.loading import load_model
from ldm.personalize import personalise

CKPT = "models/tiny/model.safetensors"
SMALL = [
    "data.params.batch_size=2", "lightning.modelcheckpoint.params.every_n_train_steps=1",
    "lightning.trainer.logger=false", "lightning.callbacks.image_logger.params.disabled=true",
    "lightning.best_step.subject=2", "lightning.best_step.others=2", "lightning.best_step.steps=2",
]  # fmt: skip


def test_photos_become_a_new_word_and_a_lora_with_their_best_step(tmp_path: Path) -> None:
    photos, priors = tmp_path / "photos", tmp_path / "priors"
    write_subject_photos(photos, "ball", 2, size=64)
    told: list[tuple[int, int]] = []

    def tell(step: int, steps: int, loss: float) -> bool:
        assert loss > 0
        told.append((step, steps))
        return step == 2

    result = personalise(
        "configs/personalize/tiny-pivotal.yaml", CKPT, photos, "toy", priors=priors, num_priors=2, steps=9, tell=tell,
        logdir=tmp_path / "logs", overrides=SMALL, flags=["--reg_steps", "2", "--placeholder_string", "<ball>"],
    )  # fmt: skip
    assert told == [(1, 9), (2, 9)] and result.steps == 2
    assert [path.name for path in sorted(priors.glob("*.txt"))] == ["prior-00000.txt", "prior-00001.txt"]
    assert [path.name for path in result.files] == ["2-embedding.safetensors", "2-lora.safetensors"]
    assert [path.name for path in result.best] == ["best-embedding.safetensors", "best-lora.safetensors"]
    scores = [json.loads(line) for line in (result.folder / "scores.jsonl").read_text().splitlines()]
    assert [score["step"] for score in scores] == [1, 2] and result.best_step in (1, 2)
    assert all(0 <= score["similarity"] <= 1 and -1 <= score["drift"] <= 1 for score in scores)
    found = artefacts.use(load_model("models/tiny/config.yaml", CKPT, "cpu"), dict.fromkeys(result.best, 0.5))
    assert {one.trigger for one in found} == {"a photo of a <ball> toy"}
    assert {one.said["base_checkpoint"] for one in found} == {CKPT}


def test_a_feature_network_that_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pick_best: 'nothing'"):
        personalise("configs/personalize/tiny-lora.yaml", CKPT, "tests", "toy", flags=["--pick_best", "nothing"])
