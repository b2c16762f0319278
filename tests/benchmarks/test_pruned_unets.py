"""The benchmark of pruned U-Nets measures passes side by side, and a training step."""

from __future__ import annotations

import pytest

from tests.cli.sampling_model import main_of

SMALL = ["--small", "--side", "8", "--rounds", "1", "--device", "cpu"]


def test_passes_and_a_step_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("benchmarks/pruned_unets.py")
    main(SMALL)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| v1", "| sd"))]
    assert [row[0] for row in rows] == ["| v1", "| sd-small", "| sd-tiny"] and rows[0][4] == "1.00"
    counts = [int(row[1].replace(",", "")) for row in rows]
    assert counts == sorted(counts, reverse=True) and all(float(row[3]) > 0 for row in rows)
    main([*SMALL, "--step", "sd-tiny", "--teacher_precision", "bf16"])
    assert "sd-tiny: " in capsys.readouterr().out
