import json
from collections import Counter

import numpy as np
from PIL import Image

from ldm.data.shapes import BACKGROUNDS, HELD_OUT, SIZES, Scene, render
from ldm.evaluation.prompt_following import (
    accuracy_of,
    check_reader,
    evaluate,
    evaluation_scenes,
    judge,
    labelled_grid,
    table,
)
from ldm.evaluation.shapes import parse


def test_scenes_are_held_out_pairs_evenly_spread() -> None:
    scenes = evaluation_scenes(200)
    assert {(scene.shape, scene.colour) for scene in scenes} == HELD_OUT
    assert Counter(Counter(scenes).values()) == {3: 40, 2: 40}
    assert {scene.size for scene in scenes} == set(SIZES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert scenes == evaluation_scenes(200) != evaluation_scenes(200, seed=1)
    assert not {(scene.shape, scene.colour) for scene in evaluation_scenes(500, "train")} & HELD_OUT


def drawn(captions: list[str], seeds: list[int]) -> list[Image.Image]:
    """What a model would draw that never fails but at every fourth picture, which it leaves empty."""
    wanted = [parse(caption) for caption in captions]
    pictures = [render(Scene(w.shape, w.colour, w.size, w.background)) for w in wanted]
    return [Image.new("RGB", (64, 64)) if seed % 4 == 3 else p for seed, p in zip(seeds, pictures, strict=True)]


def test_accuracy_is_the_share_of_right_pictures() -> None:
    judgements = evaluate(drawn, 40)
    accuracy = accuracy_of(judgements)
    assert accuracy["all"] == accuracy["shape"] == 0.75 <= accuracy["background"]
    record = json.loads(json.dumps(judgements[3].record()))
    assert record["right"] is False and record["shows"]["shape"] is None and record["seed"] == 3
    assert "everything" in table({"accuracy": accuracy}) and "75.0%" in table({"accuracy": accuracy})


def test_the_grid_frames_right_green_and_wrong_red() -> None:
    scene = Scene("ring", "pink", "small", "grey")
    judgements = judge([render(scene)] * 2, [scene.caption, "a red star"], [0, 1])
    grid = np.asarray(labelled_grid(judgements, columns=2), dtype=int)
    left, right = grid[60, 7], grid[60, 7 + 136]
    assert left[1] > left[0] and right[0] > right[1]


def test_the_reader_is_right_on_true_pictures_and_at_chance_on_shuffled_captions() -> None:
    report = check_reader(400)
    assert set(report["true"].values()) == {1.0}
    assert report["shuffled"]["all"] < 0.03
