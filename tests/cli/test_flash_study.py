"""The study of Flash students, in small: it trains, measures, draws, and does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.errors import UserError
from tests.cli.sampling_model import main_of

STUDY = "scripts/flash_study.py"


def test_a_small_study_and_its_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--pictures",
        "3",
        "--student_steps",
        "2",
        "1",
        "--teacher_steps",
        "3",
        "--samplers",
        "ddim",
        "--true_pictures",
        "4",
    ]
    words += ["--outdir", str(tmp_path), "--device", "cpu", "model.params.teacher_steps=2", "data.params.batch_size=2"]
    words += ["data.params.train.params.length=4", "lightning.trainer.max_steps=1"]
    words += ["lightning.callbacks.image_logger.params.disabled=true", "lightning.trainer.logger=false"]
    main_of(STUDY)(words)
    text = (tmp_path / "table.md").read_text()
    rows = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        ["| teacher", "plms, 3 steps", "8"],
        ["| teacher", "ddim, 2 steps", "4"],
        ["| teacher, no guidance", "lcm, 2 steps", "2"],
        ["| teacher, no guidance", "lcm, 1 step", "1"],
        ["| student", "lcm, 2 steps", "2"],
        ["| student", "lcm, 1 step", "1"],
    ]
    student = json.loads((tmp_path / "student-0.json").read_text())
    assert 0 <= student["rows"][0]["accuracy"]["all"] <= 1 and Path(student["lora"]).is_file()
    assert Image.open(tmp_path / "pictures.png").height > 6 * 144
    capsys.readouterr()
    main_of(STUDY)(words)
    said = capsys.readouterr().out
    assert "Training" not in said and "right, FID" not in said and text in said


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UserError, match="--student_steps 0"):
        main_of(STUDY)(["--student_steps", "4", "0"])
    with pytest.raises(UserError, match="--base: there is no file"):
        main_of(STUDY)(["--base", "nothing.yaml"])
