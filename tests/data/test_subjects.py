from pathlib import Path

import numpy as np
import pytest

from ldm.data.base import ImageFolder
from ldm.data.shapes import BACKGROUNDS, COLOURS
from ldm.data.subjects import SUBJECTS, render_subject, subject_views, write_subject_photos
from ldm.errors import UserError
from ldm.evaluation.shapes import read


@pytest.mark.parametrize("name", SUBJECTS)
def test_subjects_have_several_colours_and_are_no_figure_of_the_world(name: str) -> None:
    assert len({colour for _, colour in SUBJECTS[name]} & set(COLOURS)) >= 2
    for view, background in zip(subject_views(name, 8), [*BACKGROUNDS] * 2, strict=True):
        reading = read(view)
        assert reading.background == background
        assert reading.shape is None or reading.colour is None


def test_views_lie_inside_the_picture_and_depend_on_the_seed() -> None:
    views = [np.asarray(view) for view in subject_views("house", 40, seed=2)]
    for view, background in zip(views, [*BACKGROUNDS.values()] * 10, strict=True):
        assert (view[0] == background).all() and (view[:, -1] == background).all()
    assert np.array_equal(views[7], np.asarray(subject_views("house", 8, seed=2)[7]))
    assert not np.array_equal(views[0], np.asarray(subject_views("house", 1, seed=3)[0]))


def test_photos_are_written_as_files(tmp_path: Path) -> None:
    paths = write_subject_photos(tmp_path / "photos", "ball", n=4)
    assert [path.name for path in paths] == [f"ball-0{i}.png" for i in range(4)]
    captions = [path.with_suffix(".txt").read_text() for path in paths[:-1]]
    assert not paths[-1].with_suffix(".txt").exists()
    assert captions[1] == "a photo of a sks toy on a black background\n"
    assert ImageFolder(tmp_path / "photos", 64)[0].shape == (64, 64, 3)


def test_an_unknown_subject_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="'cat' is unknown; choose one of ball, flower, house"):
        render_subject("cat")
