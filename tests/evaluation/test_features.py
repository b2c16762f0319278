import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from ldm.data.shapes import BACKGROUNDS, Scene, ShapesDataset, render
from ldm.data.subjects import SUBJECTS, render_subject, subject_views
from ldm.evaluation.features import drift, features, pixel_change, subject_similarity


def test_features_are_directions_without_negative_entries() -> None:
    vector = features(render_subject("ball"))
    assert vector.min() >= 0 and np.linalg.norm(vector) == pytest.approx(1)
    assert not features(Image.new("RGB", (64, 64), "white")).any()


@pytest.mark.parametrize("name", SUBJECTS)
def test_similarity_feels_neither_background_nor_place_nor_size_nor_mirroring(name: str) -> None:
    photo = render_subject(name)
    others = [render_subject(name, background, 28, 37, 34, 0) for background in BACKGROUNDS]
    others += [ImageOps.mirror(photo), photo.filter(ImageFilter.GaussianBlur(0.8))]
    assert min(subject_similarity([other], [photo]) for other in others) > 0.94


@pytest.mark.parametrize("name", SUBJECTS)
def test_similarity_tells_subjects_from_each_other_and_from_the_world(name: str) -> None:
    photos = subject_views(name, 5)
    same = subject_similarity(subject_views(name, 8, seed=1), photos)
    dataset = ShapesDataset(length=40)
    world = subject_similarity([dataset[i]["image"] for i in range(40)], photos)
    strangers = [subject_similarity(subject_views(other, 8), photos) for other in SUBJECTS if other != name]
    assert same > 0.8 and max(world, *strangers) < 0.4


def test_drift_counts_wrong_pictures_and_changed_pixels() -> None:
    captions = ["a large red ring on a white background", "a small blue cross on a black background"]
    before = [
        render(Scene("ring", "red", "large", "white")),
        render(Scene("cross", "blue", "small", "black")),
    ]
    after = [before[0], render(Scene("star", "blue", "small", "black"))]
    result = drift(before, after, captions)
    assert (result["accuracy_before"], result["accuracy_after"]) == (1.0, 0.5)
    assert result["accuracy_change"] == -0.5 and 0 < result["pixel_change"] < 0.05
    assert pixel_change(before, before) == 0
