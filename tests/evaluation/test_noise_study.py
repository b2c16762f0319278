import json
from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.plot import Panel, draw_panels, ticks
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
    picture = np.asarray(draw_panels([Panel("title", "steps", {"a": runs, "b": [[(0, 1.0), (10, 1.0)]]})]), dtype=int)
    assert picture.shape[2] == 3
    middle = picture[:, picture.shape[1] // 2]
    blue = np.nonzero((middle[:, 2] > 150) & (middle[:, 0] < 90))[0]
    dark = np.nonzero(middle.sum(axis=1) < 260)[0]
    top, bottom = blue.mean(), 400 - 76
    assert dark.mean() == pytest.approx(bottom - 0.25 * (bottom - top) * 0.97, abs=12)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 1200, [0, 500, 1000, 1500]), (0, 0, None)]
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) >= 2
    assert expected is None or found == pytest.approx(expected)
