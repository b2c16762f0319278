import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ldm.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, ShapesDataset, render
from ldm.errors import UserError
from ldm.evaluation.shapes import ATTRIBUTES, Reading, parse, prompt_accuracy, read

EVERYTHING = [Scene(s, c, z, b, 30, 35) for s in SHAPES for c in COLOURS for z in SIZES for b in BACKGROUNDS]


def test_every_true_picture_is_read_right() -> None:
    images, captions = [render(scene) for scene in EVERYTHING], [scene.caption for scene in EVERYTHING]
    assert prompt_accuracy(images, captions) == dict.fromkeys((*ATTRIBUTES, "all"), 1.0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_true_items_score_full_and_shuffled_captions_score_chance(split: str) -> None:
    dataset = ShapesDataset(split=split, length=300, seed=1)
    scenes = [dataset.scene(i) for i in range(300)]
    images, captions = [dataset[i]["image"] for i in range(300)], [scene.caption for scene in scenes]
    assert prompt_accuracy(images, captions)["all"] == 1.0
    shuffled = prompt_accuracy(images, [captions[i] for i in np.random.default_rng(0).permutation(300)])
    chance = {}
    for name in ATTRIBUTES:
        _, counts = np.unique([getattr(scene, name) for scene in scenes], return_counts=True)
        chance[name] = ((counts / 300) ** 2).sum()
    for name, expected in chance.items():
        assert shuffled[name] == pytest.approx(expected, abs=0.08)
    assert shuffled["all"] < 0.04


def test_reading_survives_blur_and_noise() -> None:
    scenes = EVERYTHING[::5]
    rng = np.random.default_rng(0)
    images = []
    for scene in scenes:
        blurred = np.asarray(render(scene).filter(ImageFilter.GaussianBlur(1.0)), dtype=float)
        images.append(np.clip(blurred + rng.normal(0, 10, blurred.shape), 0, 255).astype(np.uint8))
    assert prompt_accuracy(images, [scene.caption for scene in scenes])["all"] >= 0.99


def test_an_empty_picture_shows_a_background_only() -> None:
    assert read(Image.new("RGB", (64, 64), BACKGROUNDS["cyan"])) == Reading(background="cyan")
    assert read(Image.new("RGB", (64, 64), (90, 200, 20))) == Reading()


def test_what_is_not_of_this_world_has_no_name() -> None:
    two = render(Scene("circle", "red", "small", "white", 18, 32))
    ImageDraw.Draw(two).ellipse([38, 21, 60, 43], fill=COLOURS["red"])
    assert read(two).shape is None
    striped = np.array(render(Scene("square", "red", "large", "white")))
    striped[:, 16:48:6] = striped[:, 17:48:6] = striped[:, 18:48:6] = COLOURS["blue"]
    assert read(striped).colour is None
    assert read(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).shape is None


def test_larger_pictures_and_float_arrays_read_alike() -> None:
    scene = Scene("ring", "pink", "large", "grey")
    wanted = Reading("ring", "pink", "large", "grey")
    assert read(render(scene, 256)) == wanted
    assert read(np.asarray(render(scene), dtype=np.float32) / 127.5 - 1) == wanted


def test_captions_are_parsed_by_their_words() -> None:
    wanted = Reading("star", "red", "large", "white")
    assert parse("A photo of a large red Star, on a white background.") == wanted
    assert parse("a ring") == Reading(shape="ring")
    assert parse("a photo of a sks toy") == Reading()


def test_accuracy_counts_only_what_captions_name() -> None:
    images = [render(Scene("ring", "pink", "large", "grey")), render(Scene("star", "red", "small", "white"))]
    accuracy = prompt_accuracy(images, ["a pink ring", "a blue star on a white background"])
    assert accuracy == {"shape": 1.0, "colour": 0.5, "background": 1.0, "all": 0.5}
    with pytest.raises(UserError, match="names nothing"):
        prompt_accuracy(images[:1], ["a photo of a dog"])
