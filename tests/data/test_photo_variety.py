"""Photos for personalisation that keep their aspect, or vary in crop and colour; all are encoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.dreambooth import DataModuleFromConfig
from ldm.data.personalized_dream import PersonalizedBase
from ldm.errors import UserError
from tests.models.test_ddpm_dream import dream

TARGET = "ldm.data.personalized_dream.PersonalizedBase"
BUCKETS = {"step": 32, "min_side": 32}


@pytest.fixture
def photos(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(128, 32), (130, 33), (64, 64), (66, 64)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return str(tmp_path)


def test_photos_keep_their_aspect_and_prior_images_follow(photos: str) -> None:
    params = dict(data_root=photos, size=64, repeats=2, placeholder_token="toy")
    train = {"target": TARGET, "params": {**params, "buckets": BUCKETS}}
    module = DataModuleFromConfig(
        2, train=train, reg={"target": TARGET, "params": {**params, "reg": True}}, num_workers=0
    )
    module.setup("fit")
    model = dream()
    module.encode(model, torch.device("cpu"))
    sizes = []
    for batch in module.train_dataloader():
        instance, prior = (batch[name]["moments"].shape for name in ("instance", "prior"))
        assert instance == prior
        sizes.append(tuple(instance[2:]))
        assert model.shared_step(batch)[0].isfinite()
    assert sorted(sizes) == [(8, 32)] * 2 + [(16, 16)] * 2


def test_crops_and_colours_vary_by_version_and_are_always_the_same(photos: str) -> None:
    plain = PersonalizedBase(photos, size=32)
    assert plain.versions == 1 and np.array_equal(plain.image(0), plain.image(0, version=3))
    varied = PersonalizedBase(photos, size=32, crop="random", versions=4)
    views = [varied.image(0, version=version) for version in range(4)]
    assert all(not np.array_equal(views[0], view) for view in views[1:])
    assert np.array_equal(views[2], varied.image(0, version=2))
    assert {varied.version(item) for item in range(100)} == {0, 1, 2, 3}
    coloured = PersonalizedBase(photos, size=32, colour=0.3)
    assert coloured.versions == 8
    assert not np.array_equal(coloured.image(2, version=1), plain.image(2))
    assert np.abs(coloured.image(2, version=1) - plain.image(2)).mean() < 0.3
    assert PersonalizedBase(photos, size=32, colour=0.3, set="val").versions == 1


@pytest.mark.parametrize(("params", "said"), [({"crop": "left"}, "center, random, squash"), ({"colour": 2}, "below 1")])
def test_wrong_settings_are_named(params: dict, said: str, photos: str) -> None:
    with pytest.raises(UserError, match=said):
        PersonalizedBase(photos, size=32, **params)


def test_the_subject_is_called_by_its_new_word(photos: str) -> None:
    (Path(photos) / "0.txt").write_text("two sks on asksome table")
    captions = PersonalizedBase(photos, size=32, placeholder_token="toy", subject="<toy>")
    assert captions.caption(0) == "two <toy> on asksome table" and captions.caption(1) == "a photo of a <toy> toy"
