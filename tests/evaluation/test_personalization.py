"""The numbers of a tuned model beside its base, and the sheet that shows them."""

import numpy as np
import pytest
from PIL import Image

from ldm.data.shapes import Scene, render
from ldm.data.subjects import write_subject_photos
from ldm.errors import UserError
from ldm.evaluation.personalization import (
    Pictures,
    Sampling,
    background_share,
    check_apart,
    compare,
    other_prompts,
    prior_prompts,
    subject_prompts,
    write_prior_images,
)
from ldm.evaluation.prompt_following import evaluation_scenes
from ldm.evaluation.sheet import Row, draw_sheet


def test_prompts_of_the_subject_name_it_on_every_background() -> None:
    prompts = subject_prompts("toy", 7)
    assert prompts[0] == prompts[5] == "a photo of a sks toy"
    assert sorted(p.split()[-2] for p in prompts[1:5]) == ["black", "cyan", "grey", "white"]


def test_other_prompts_do_not_name_the_subject() -> None:
    prompts = other_prompts(20)
    assert len(prompts) == 20 and not any("sks" in p or "toy" in p for p in prompts)


def test_prior_prompts_name_the_class_scenes_and_nothing() -> None:
    prompts = prior_prompts("circle", 40)
    assert len(prompts) == 40 and prompts[4] == "a photo of a circle on a black background"
    scenes = {scene.caption for scene in evaluation_scenes(384, "all")}
    assert len(scenes) == 384
    assert sum(prompt in scenes for prompt in prompts) == 25 and prompts.count("") == 5


def test_no_prior_image_is_drawn_for_a_prompt_that_measures_what_changed() -> None:
    prior, others = prior_prompts("toy", 160), other_prompts(200)
    assert len(set(others)) == 200 and not set(prior) & set(others)
    held_out = {scene.caption for scene in evaluation_scenes(80, "test")}
    check_apart(prior, others)
    with pytest.raises(UserError, match="--others 300 and --prior_images 160 need 400 captions, .* has 384: 16 would"):
        check_apart(prior, other_prompts(300))
    assert held_out & set(prior) and held_out & set(others), "the tiny world's scenes, whichever training showed"


def test_prior_images_take_the_place_of_earlier_ones(tmp_path) -> None:
    class Drawn(Sampling):
        def draw(self, model, prompts, seed):
            assert self.scale == 1.0, "without guidance"
            return [Image.new("RGB", (8, 8), (seed + i, 0, 0)) for i, _ in enumerate(prompts)]

    (tmp_path / "keep.png").touch()
    write_prior_images(None, ["a", "b", "c"], tmp_path, 0, Drawn())
    write_prior_images(None, ["d", "e"], tmp_path, 7, Drawn())
    names = ["00000.png", "00000.txt", "00001.png", "00001.txt", "keep.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "00001.txt").read_text() == "e\n"
    with Image.open(tmp_path / "00001.png") as image:
        assert image.getpixel((0, 0)) == (8, 0, 0)


def test_a_perfectly_tuned_model_is_measured_as_one(tmp_path) -> None:
    photos = [Image.open(p).convert("RGB") for p in write_subject_photos(tmp_path, "flower", 4, seed=0)]
    plain = [render(Scene("circle", "red", "large", "white"))] * 4
    scenes = [Scene("star", "red", "large", b) for b in ("white", "black", "grey", "cyan")]
    others, captions = [render(s) for s in scenes], [s.caption for s in scenes]
    before, after = Pictures(plain, others), Pictures(photos, others)
    numbers = compare(photos, before, after, ["a photo of a sks toy"] * 4, captions)
    assert numbers["similarity_after"] == pytest.approx(numbers["similarity_photos"])
    assert numbers["similarity_before"] < 0.7 * numbers["similarity_after"]
    assert numbers["accuracy_before"] == numbers["accuracy_after"] == 1.0
    assert numbers["accuracy_change"] == numbers["pixel_change"] == 0.0
    harmed = compare(photos, before, Pictures(photos, plain), ["a photo of a sks toy"] * 4, captions)
    assert harmed["accuracy_change"] == -1.0 and harmed["pixel_change"] > 0.05


def test_backgrounds_that_were_asked_for_are_counted() -> None:
    pictures = [render(Scene("star", "red", "large", b)) for b in ("white", "black", "grey")]
    prompts = ["a photo of a sks toy", *["a photo of a sks toy on a black background"] * 2]
    assert background_share(pictures, prompts) == 0.5


def test_the_sheet_shows_every_picture_and_wraps_its_caption() -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    rows = [Row("before", "three", [red] * 3, ["a caption that is too long for one line"] * 3, gap=True)]
    sheet = draw_sheet([*rows, Row("after", "two", [blue] * 2)], "Title", ["a note"])
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == pytest.approx(3 * 144**2, rel=0.02)
    assert (pixels == (0, 0, 255)).all(1).sum() == pytest.approx(2 * 144**2, rel=0.02)
