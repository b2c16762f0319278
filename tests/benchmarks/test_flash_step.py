"""The benchmark of a training step, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.flash_step import main
from ldm.errors import UserError
from tests.distillation.flash_models import PHASE, teacher_config


def test_a_row_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"teacher_config": teacher_config(), "phases": [PHASE], "teacher_steps": 4, "lora_config": {"rank": 2}}
    model = {"target": "ldm.distillation.flash.FlashDiffusion", "params": params}
    path = tmp_path / "small.yaml"
    OmegaConf.save(OmegaConf.create({"model": model}), path)
    with pytest.raises(UserError, match="--starts 4"):
        main(["--base", str(path), "--starts", "4"])
    params["teacher_config"]["params"]["unet_config"]["params"]["in_channels"] = 3
    params["teacher_config"]["params"]["unet_config"]["params"]["out_channels"] = 3
    OmegaConf.save(OmegaConf.create({"model": model}), path)
    main(["--base", str(path), "--starts", "3", "0", "--side", "8"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["| 3", "| 0"] and all(float(row[1]) > 0 for row in rows)
