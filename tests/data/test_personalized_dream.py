from pathlib import Path

import numpy as np
import pytest

from ldm.data.personalized_dream import PersonalizedBase
from ldm.data.subjects import write_subject_photos
from ldm.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for path in write_subject_photos(tmp_path, "ball", n=3, size=80):
        path.with_suffix(".txt").unlink(missing_ok=True)
    return str(tmp_path)


def test_items_and_captions(photos: str) -> None:
    instances = PersonalizedBase(photos, size=64, placeholder_token="toy")
    assert instances.num_images == 3 and len(instances) == 300
    item = instances[4]
    assert item["index"] == 1 and item["caption"] == "a photo of a sks toy"
    assert item["image"].shape == (64, 64, 3) and item["image"].dtype == np.float32
    assert -1 <= item["image"].min() and item["image"].max() <= 1
    regular = PersonalizedBase(photos, size=64, placeholder_token="toy", reg=True, coarse_class_text="small")
    assert regular[0]["caption"] == "a photo of a small toy"


def test_a_photo_may_have_its_own_caption(photos: str) -> None:
    (Path(photos) / "ball-01.txt").write_text("\ufeffa photo of a sks toy\n in the grass\n", encoding="utf-8")
    (Path(photos) / "ball-02.txt").write_text(" \n")
    captions = [PersonalizedBase(photos, size=64, placeholder_token="toy")[i]["caption"] for i in range(3)]
    assert captions == ["a photo of a sks toy", "a photo of a sks toy in the grass", ""]
    (Path(photos) / "ball-00.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="ball-00.txt cannot be read as text"):
        PersonalizedBase(photos, size=64)


def test_only_training_sets_repeat(photos: str) -> None:
    assert len(PersonalizedBase(photos, size=64, repeats=10)) == 30
    assert len(PersonalizedBase(photos, size=64, repeats=10, set="val")) == 3


def test_flips_are_a_function_of_seed_and_item(photos: str) -> None:
    first, again = (PersonalizedBase(photos, size=64, seed=5) for _ in range(2))
    other = PersonalizedBase(photos, size=64, seed=6)
    flips = [first.choose(i)[1] for i in range(300)]
    assert flips == [again.choose(i)[1] for i in range(300)]
    assert flips != [other.choose(i)[1] for i in range(300)]
    assert 110 < sum(flips) < 190
    for item in (flips.index(True), flips.index(False)):
        index, flip = first.choose(item)
        assert np.array_equal(first[item]["image"], first.image(index, flip))
    assert np.array_equal(first.image(0, flip=True), first.image(0)[:, ::-1])
    assert not any(PersonalizedBase(photos, size=64, flip_p=0).choose(i)[1] for i in range(300))


def test_bad_parameters_are_clear_errors(photos: str, tmp_path: Path) -> None:
    for options, message in (
        ({"flip_p": 2}, "flip_p is 2"),
        ({"repeats": 0}, "repeats is 0"),
        ({"per_image_tokens": True}, "per_image_tokens"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
    ):
        with pytest.raises(UserError, match=message):
            PersonalizedBase(photos, size=64, **options)
    with pytest.raises(UserError, match="does not exist"):
        PersonalizedBase(str(tmp_path / "nowhere"))
    with pytest.raises(IndexError):
        PersonalizedBase(photos, size=64, repeats=1)[3]
