import hashlib

import numpy as np
import pytest

from ldm.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    JITTER,
    PAIRS,
    SHAPES,
    SIZES,
    WORLD,
    Scene,
    ShapesDataset,
    mask,
    render,
)
from ldm.errors import UserError


def test_the_world_is_large_enough_and_its_colours_lie_apart() -> None:
    assert (len(SHAPES), len(COLOURS), len(SIZES), len(BACKGROUNDS)) == (6, 8, 2, 4)
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()], dtype=float)
    distance = np.linalg.norm(palette[:, None] - palette, axis=-1)
    assert distance[~np.eye(len(palette), dtype=bool)].min() > 90


def test_held_out_pairs_are_spread_over_shapes_and_colours() -> None:
    assert set(HELD_OUT) < set(PAIRS) and len(HELD_OUT) == 10
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)
    for split, held_out in (("train", False), ("validation", False), ("test", True)):
        dataset = ShapesDataset(split=split, length=400)
        assert {((s := dataset.scene(i)).shape, s.colour) in HELD_OUT for i in range(400)} == {held_out}


def test_items_are_a_function_of_seed_split_and_index() -> None:
    first, second = ShapesDataset(length=50, seed=3), ShapesDataset(length=90, seed=3)
    for index in (0, 49):
        assert np.array_equal(first[index]["image"], second[index]["image"])
        assert first[index]["caption"] == second[index]["caption"]
    other_seed, other_split = ShapesDataset(length=50, seed=4), ShapesDataset("validation", length=50, seed=3)
    assert [first.scene(i) for i in range(50)] != [other_seed.scene(i) for i in range(50)]
    assert [first.scene(i) for i in range(50)] != [other_split.scene(i) for i in range(50)]
    with pytest.raises(IndexError):
        first[50]


def test_pictures_stay_the_same_from_release_to_release() -> None:
    picture = render(Scene("star", "green", "large", "cyan", 30, 35))
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == "d17117697618cd56"


def test_items_have_the_documented_form() -> None:
    dataset = ShapesDataset(length=40, variety=True)
    for index in range(40):
        item = dataset[index]
        assert item["image"].shape == (64, 64, 3) and item["image"].dtype == np.float32
        assert item["image"].min() >= -1 and item["image"].max() <= 1
    captions = [item["caption"] for item in dataset]
    assert 3 <= captions.count("a picture") <= 24


def test_a_tenth_of_the_training_captions_say_it_differently() -> None:
    train, test = ShapesDataset(length=1000), ShapesDataset("test", length=100)
    plain = sum(train[i]["caption"] == train.scene(i).caption for i in range(1000))
    assert 860 <= plain <= 940
    assert all(test[i]["caption"] == test.scene(i).caption for i in range(100))


def test_toys_have_two_of_the_worlds_colours_on_a_background_that_the_caption_names() -> None:
    plain, mixed = ShapesDataset(length=400), ShapesDataset(length=400, toys=0.3)
    toys = [i for i in range(400) if "toy" in mixed[i]["caption"]]
    assert 90 <= len(toys) <= 150 and not any("toy" in plain[i]["caption"] for i in range(400))
    others = next(i for i in range(400) if i not in toys)
    assert np.array_equal(plain[others]["image"], mixed[others]["image"])
    palette = {colour: name for name, colour in (COLOURS | BACKGROUNDS).items()}
    for i in toys:
        image = ((mixed[i]["image"] + 1) * 127.5).round().astype(int).reshape(-1, 3)
        shown = {palette.get(tuple(pixel)) for pixel in image} - {None}
        caption = mixed[i]["caption"]
        assert len(shown & set(BACKGROUNDS)) == 1 and len(shown & set(COLOURS)) == 2
        named = (set(COLOURS) | set(BACKGROUNDS)) & set(caption.split())
        assert named <= shown, caption
    with pytest.raises(UserError, match="toys is 2"):
        ShapesDataset(toys=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_lie_inside_the_picture_at_any_jitter(shape: str) -> None:
    for x in (WORLD / 2 - JITTER, WORLD / 2 + JITTER):
        covered = mask(shape, SIZES["large"], x, x)
        assert covered[0].max() == covered[-1].max() == covered[:, 0].max() == covered[:, -1].max() == 0
        assert 0 < (covered > 0).sum() - (covered == 1).sum(), "no antialiased rim"


def test_pictures_scale_with_their_size() -> None:
    scene = Scene("cross", "blue", "small", "white", 30, 34)
    small, large = np.asarray(render(scene), float), np.asarray(render(scene, 128), float)
    halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 0.5


def test_an_unknown_split_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="split is 'val'.*train, validation, test"):
        ShapesDataset(split="val")
