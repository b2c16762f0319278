"""The benchmark of pairing images with noise measures every way and makes a table of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

path = Path(__file__).resolve().parents[2] / "benchmarks" / "noise_assignment.py"
spec = importlib.util.spec_from_file_location("noise_assignment", path)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_every_way_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--small", "--runs", "1", "--k", "3"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 16", "| 64"))]
    ways = [benchmark.HERE, benchmark.CDIST, benchmark.BROADCAST, benchmark.KNN]
    assert [line.split(" | ")[1] for line in lines] == 2 * ways
    assert all(float(line.split(" | ")[2].removesuffix(" s")) > 0 for line in lines)
    assert all(line.endswith("| 0.000 |") for line in lines if benchmark.CDIST in line)


def test_what_is_too_large_is_left_out() -> None:
    results = benchmark.measure_batch(16, 64, 2, 1, most=1e-6)
    assert benchmark.BROADCAST not in results
    results = dict.fromkeys([benchmark.HERE, benchmark.CDIST, benchmark.KNN], results[benchmark.HERE])
    assert "| broadcast | does not fit | | 128 GiB |" in benchmark.rows(4096, 4096, results)[2]
