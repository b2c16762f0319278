"""Trainings of the page: the ways that fit the model, and a result that is used at once, of however many files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import artefacts, personalize
from ldm.data.subjects import write_subject_photos
from ldm.errors import UserError
from ldm.inference import txt2img
from ldm.util import load_yaml
from ldm.web import learner, training, ways
from ldm.web.jobs import Job
from ldm.web.studio import Studio
from tests.web.running import CONFIG

SMALL = {
    "data": {"params": {"batch_size": 2}},
    "lightning": {"best_step": {"subject": 2, "others": 2, "steps": 2}},
}
ASKED = {"class_word": "toy", "steps": 9, "every": 5, "prior": 2, "rate": None, "seed": 0, "captions": ""}


def test_the_ways_are_those_of_the_models_own_size() -> None:
    for config, named in ((CONFIG, "tiny"), ("configs/stable-diffusion/v1-inference.yaml", "")):
        found = ways.offered(load_yaml(config), None)
        assert list(found) == list(ways.WAYS)
        assert all(("tiny" in str(way.base.relative_to(ways.CONFIGS))) == bool(named) for way in found.values())
        assert [title for title, way in found.items() if way.word] == ["New word", "New word and LoRA"]
    other = load_yaml("configs/stable-diffusion/v2-inference.yaml")
    assert not ways.offered(other, None)
    assert list(ways.offered(other, "configs/personalize/lora.yaml")) == ["As in lora.yaml"]


def test_a_word_and_lora_are_learnt_until_somebody_stops_and_worn_with_one_slider(
    studio: Studio, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    OmegaConf.save(OmegaConf.merge(load_yaml("configs/personalize/tiny-pivotal.yaml"), SMALL), own)
    studio.options.train_base = str(own)
    photos = [str(path) for path in write_subject_photos(tmp_path / "photos", "ball", 2, size=64)]
    asked = training.Training.of(studio, ASKED | {"photos": photos, "way": "As in own.yaml"})
    run, job = training._Run(studio, asked), Job("", lambda _: None)

    training.draw_priors(studio, asked, run.folder / "priors", job)
    assert len(list((run.folder / "priors").glob("prior-*.png"))) == 2 and job.done == 0
    run.write_settings()
    (run.folder / learner.STOP).touch()
    learner.main([str(run.folder)])
    assert run.look(job) and not run.look(job)
    assert [step for step, _ in job.losses] == [step for step, _ in job.samples] == [1]
    assert job.losses[0][1] > 0 and job.samples[0][1].startswith(b"\xff\xd8")
    assert run.keep(job) == "step 1 of 1 was the best and is kept"

    (name,) = job.results
    assert name == "toy-1 As in own.yaml, 1 steps" and list(studio.shelf.all()) == [name]
    assert [artefacts.look(path).kind for path in studio.shelf.find(name)] == ["embedding", "lora"]
    prompt = studio.shelf.prompt(name)
    assert prompt == "a photo of a <toy-1> toy"
    assert not list(run.folder.glob("**/*.ckpt")), "nothing of the size of the model lies about"

    def picture(weight: float) -> np.ndarray:
        studio.wear({name: weight})
        return np.asarray(txt2img(studio.model, prompt, steps=2, precision="full", progress=False)[0].image)

    plain, half, whole = picture(0), picture(0.5), picture(1)
    assert not np.array_equal(plain, whole) and not np.array_equal(half, whole)
    assert np.array_equal(picture(0), plain)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"way": "../../evil.yaml"}, "How it is learnt"),
        ({"photos": []}, "Photos: 0 of them"),
        ({"captions": "one\ntwo\nthree"}, "Captions: 3 lines for 1 photos"),
        ({"steps": 10}, "Steps"),
        ({"prior": 10**6}, "Prior images"),
        ({"rate": float("nan")}, "Learning rate"),
        ({"class_word": "a/b"}, "Class word"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    studio: Studio, tmp_path: Path, wrong: dict[str, object], said: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=said):
        training.Training.of(studio, ASKED | {"photos": [tmp_path / "a.png"], "way": "LoRA"} | wrong)
    assert not (studio.folder / "trainings").exists()


def test_a_model_that_a_training_would_not_take_is_told_at_once(studio: Studio, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = ASKED | {"photos": [tmp_path / "a.png"], "way": "LoRA"}
    studio.options.allow_pickle = True
    training.Training.of(studio, asked)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hook": os.getcwd}, tmp_path / "old.ckpt")
    studio.options.ckpt = str(tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="pickles posix.getcwd, .* scripts/convert.py --allow_pickle$"):
        training.Training.of(studio, asked)
    studio.options.vae = "vae.safetensors"
    with pytest.raises(UserError, match="start the page without --vae to train"):
        training.Training.of(studio, asked)


def test_a_run_that_ends_badly_says_why_in_a_line(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    log.write_text("Loading\nerror: the disk is full\n")
    assert training.reason_in(log, 2) == "the disk is full"
    log.write_text("Traceback (most recent call last):\nMemoryError\n")
    assert training.reason_in(log, -9).startswith("it ended without a result (exit code -9); ")
    (tmp_path / learner.PROGRESS).write_text(json.dumps([1, 0.5]) + "\n[2, 0.")
    assert training.read_losses(tmp_path / learner.PROGRESS) == [(1, 0.5)], "a line that is being written waits"


def test_a_run_whose_page_is_gone_ends_with_the_present_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def personalise(tell: Callable[[int, int, float], bool]) -> personalize.Result:
        assert not tell(1, 9, 0.5)
        monkeypatch.setattr(os, "getppid", lambda: -1)
        assert tell(2, 9, 0.5)
        return personalize.Result(tmp_path, 2, 1.0, 1, (tmp_path / "2-lora.safetensors",))

    monkeypatch.setattr(personalize, "personalise", personalise)
    (tmp_path / learner.SETTINGS).write_text("{}")
    learner.main([str(tmp_path)])
    assert json.loads((tmp_path / learner.RESULT).read_text())["steps"] == 2, "what it has learnt is there"
