"""The benchmark of loading measures every side and makes a table of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.networks import ROOT
from tests.pipelines import libraries

spec = importlib.util.spec_from_file_location("loading", ROOT / "benchmarks" / "loading.py")
loading = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loading)


def test_every_side_is_measured(tmp_path: Path) -> None:
    libraries()
    loading.write_models(tmp_path, small=True, half=False)
    results = {side: [loading.measure(side, tmp_path, tmp_path)] for side in loading.SIDES}
    assert len({runs[0]["bytes"] for runs in results.values()}) == 1  # the same weights everywhere
    for runs in results.values():
        assert 0 < runs[0]["loaded"] < runs[0]["read"]
    rows = loading.table(results)[4:]  # below the title and the heads of the columns
    assert [row.split(" | ")[0] for row in rows] == [f"| {side}" for side in loading.SIDES]
    assert rows[0].split(" | ")[2] == "1.00"


def test_bad_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        loading.main(["--measure", "both"])
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
