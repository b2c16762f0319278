"""scripts/sampler_study.py on a small random model: counted evaluations, tables, and going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.samplers import SAMPLERS
from tests.cli.sampling_model import main_of, write_model

study = main_of("scripts/sampler_study.py")


def test_evaluations_are_counted_and_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, checkpoint = write_model(tmp_path)
    words = ["--config", str(config), "--ckpt", str(checkpoint), "--device", "cpu", "--outdir", str(tmp_path / "out")]
    words += ["--n", "1", "--evaluations", "4", "9", "--few_n", "0"]
    names = ["plms", "ddim", "heun"]
    study([*words, "--samplers", *names])
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(records) == 6
    for record in records:
        name, allowed = record["sampler"], record["evaluations"]
        assert (record["schedule"] == "sgm_uniform") == SAMPLERS[name].scheduled
        assert allowed - 2 < record["calls"] <= allowed
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| evaluations | 4 | 9 |" in text and "| Heun SGM Uniform | " in text and "(3)" in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    monkeypatch.setattr("ldm.inference.load_model", None)
    study([*words, "--samplers", *names])  # all is there
    with pytest.raises(TypeError):
        study([*words, "--samplers", *names, "--scale", "2"])


def test_mistakes_are_told_before_a_model_is_loaded() -> None:
    for words, message in (
        (["--n", "0"], "--n: must be at least 1"),
        (["--evaluations", "4", "0"], "--evaluations: must be at least 1"),
        (["--few_n", "-1"], "--few_n -1: must be 0 or more"),
        (["--ckpt", "nowhere"], "--ckpt: there is no file 'nowhere'"),
    ):
        with pytest.raises(UserError, match=message):
            study(words)
