import json
from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.plot import Panel, average, draw_panels
from ldm.evaluation.quality import FeatureNet
from tests.cli.sampling_model import main_of

SMALL = ["--batch_size", "4", "--scenes", "8", "--pictures", "4", "--measurements", "2", "--sampling_steps", "2"]


@pytest.fixture(scope="module")
def study():
    return main_of("scripts/noise_study.py")


def test_runs_are_made_once_and_told_in_table_and_curve(study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL, "--steps", "2", "--methods", "assignment", "knn", "--seeds", "0", "--device", "cpu"]
    words += ["--outdir", str(tmp_path)]
    draw = FeatureNet.of_tiny_world
    monkeypatch.setattr(FeatureNet, "of_tiny_world", lambda features: draw(features, 200))
    study(words)
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert [record["method"] for record in records] == ["assignment", "knn"]
    for record in records:
        assert [point["step"] for point in record["curve"]] == [1, 2]
        assert 0 < record["noise_share"] < 1 and all(np.isfinite(point["fid"]) for point in record["curve"])
    assert (tmp_path / "curve.png").stat().st_size > 1000
    text = (tmp_path / "table.md").read_text()
    assert text.count("| knn |") == 3 and "| 2 | assignment | 1 |" in text
    monkeypatch.setattr("ldm.evaluation.noise_study.Bench", None)
    study(words)
    assert (tmp_path / "table.md").read_text() == text
    with pytest.raises(TypeError):  # another k is another run, of KNN alone
        study([*words, "--k", "3"])
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_curves_lie_where_their_numbers_are() -> None:
    runs = [[(0, 0.0), (10, 1.0)], [(0, 0.0), (10, 0.0)]]
    panel = Panel("title", "steps", {"a": runs, "b": [[(0, 1.0), (10, 1.0)]]})
    picture = np.asarray(draw_panels([panel]), dtype=int)
    assert picture.shape == (420, 560, 3)
    middle = picture[:, 300]  # about x = 5
    blue = np.nonzero((middle[:, 2] > 150) & (middle[:, 0] < 90))[0].mean()  # at y = 1
    bottom = np.nonzero((picture[:, 250:350].sum(axis=2) < 120).all(axis=1))[0].mean()  # the axis, at y = 0
    dark = np.nonzero(middle[: int(bottom) - 5].sum(axis=1) < 260)[0].mean()  # the mean, at y = 0.25
    assert (bottom - dark) / (bottom - blue) == pytest.approx(0.25, abs=0.05)


def test_means_are_those_of_the_runs_that_have_the_point() -> None:
    assert average([[(0, 0.0), (2, 1.0)], [(2, 3.0), (1, 5.0)]]) == [(0, 0.0), (1, 5.0), (2, 2.0)]
