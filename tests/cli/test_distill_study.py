"""The study of pruned students: runs are made once, and told in a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from tests.cli.sampling_model import main_of

WORDS = [
    "--students", "tiny-tiny", "--seeds", "0", "--steps", "1", "--pictures", "2", "--sampling_steps", "1",
    "--rounds", "1", "--batches", "1", "--device", "cpu", "data.params.batch_size=2",
    "data.params.train.params.length=4",
]  # fmt: skip


def test_runs_are_made_once_and_told_in_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = main_of("scripts/distill_study.py")
    words = ["--outdir", str(tmp_path), *WORDS]
    study(words)
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(records) == {"teacher", "tiny-tiny-taught-0", "tiny-tiny-untaught-0", "costs"}
    assert records["teacher"]["parameters"] == 7_014_532
    assert records["tiny-tiny-taught-0"]["parameters"] == records["tiny-tiny-untaught-0"]["parameters"] == 3_262_724
    assert all(cost["seconds"] > 0 for costs in records["costs"]["batches"].values() for cost in costs.values())
    text = (tmp_path / "table.md").read_text()
    assert "| tiny-tiny, taught | 3,262,724 | 46.5% | 1 |" in text and "| teacher | 1 |" in text
    assert (tmp_path / "pictures.png").stat().st_size > 1000 and not list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(study.__globals__["Bench"], "__init__", None)
    study(words)
    assert (tmp_path / "table.md").read_text() == text
    with pytest.raises(TypeError):  # other runs
        study([*words, "--learning_rate", "1e-4"])


@pytest.mark.parametrize("words", [["--steps", "0"], ["--learning_rate", "2"], ["x"]])
def test_what_cannot_be_is_one_line(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words[0]):
        main_of("scripts/distill_study.py")(["--outdir", str(tmp_path), *words])
