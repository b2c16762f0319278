"""The benchmark: both sides of every row do the same job, take turns, and make a table."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import bench, command, growth, loading, machine
from benchmarks.side_by_side import Counts, Job, Result, Row, Settings, Way, count, difference, measure, plain
from ldm.errors import UserError
from tests.pipelines import libraries

ALL = bench.rows(Settings("tiny", "cpu", Path("nowhere")))
ROWS = {row.name: row for row in ALL if row.name != "help" and not row.asked}
# Whose code other rows run.
SHARED = {"load_again", "load_call", "load_ckpt", "load_cold", "dreambooth_unchecked", "assign_16", "knn_16"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    libraries()
    settings = Settings("tiny", "cpu", tmp_path_factory.mktemp("weights"))
    loading.write(settings)
    return settings


@pytest.mark.parametrize("name", sorted(set(ROWS) - SHARED))
def test_both_sides_do_the_same(name: str, settings: Settings) -> None:
    row = ROWS[name]
    jobs = [way.make(settings, **way.arguments) for way in (row.ours, row.theirs)]
    results = [plain((job.result or job.work)()) for job in jobs]
    if results[1] is not None:  # all but those that only draw or read
        assert difference(*results) <= (float("inf") if row.tolerance is None else row.tolerance)  # of one shape
    for job in jobs:
        job.work()


# ---- turns ----------------------------------------------------------------------------------------------------


def slow(settings: Settings, seconds: float, value: float) -> Job:
    return Job(lambda: time.sleep(seconds), lambda: [torch.tensor([1.0, value]), 5.0])


NOTHING = Counts(*(0,) * 7)


def broken(settings: Settings) -> Job:
    raise ValueError("there is no such network")


def row(ours: Way, theirs: Way, **more: object) -> Row:
    return Row("row", "a row", ours, theirs, **more)


def test_sides_take_turns(tmp_path: Path) -> None:
    settings = Settings("tiny", "cpu", tmp_path)
    here, there = (Way(name, slow, {"seconds": s, "value": 2.0}) for name, s in (("here", 0.02), ("there", 0.2)))
    result = measure(row(here, there), settings, rounds=3)
    assert len(result.seconds) == len(result.bytes) == 3 and result.difference == 0.0
    ratio, low, high = result.ratios()
    assert low <= ratio <= high < 1 and result.medians()[1] >= 0.2
    with pytest.raises(RuntimeError, match="(?s)broken.*there is no such network"):
        measure(row(Way("broken", broken), there), settings, rounds=1)


def test_results_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"here": [[1.0, 2.1], 5.0], "there": [[1.0, 2.0], 5.0]}
    monkeypatch.setattr("benchmarks.side_by_side.alone", lambda way, settings, *orders: [(answers[way.name], NOTHING)])
    ways = [Way(name, slow) for name in answers]
    with pytest.raises(RuntimeError, match="row: the results differ by 5.0e-02, more than 1e-03"):
        measure(row(*ways, fresh=True), Settings("tiny", "cpu", tmp_path), rounds=0)
    assert measure(row(*ways, fresh=True, tolerance=0.1), Settings("tiny", "cpu", tmp_path), 0).difference < 0.06


def test_operations_are_counted() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)

    def work() -> None:
        product = torch.nn.functional.linear(a, b.T).T.contiguous()
        float(product.double().sum())

    with torch.inference_mode():
        counts, _ = count(Job(work, least_bytes=7))
    assert counts.flops == 2 * 8 * 16 * 4 and counts.least_bytes == 7
    assert counts.copies == 2 and counts.copied == 8 * 4 * (4 + 8)  # contiguous, double
    assert counts.float64 == 2 and counts.waits == 1  # double and its sum; float()


def test_so_are_those_of_onednn() -> None:
    x, conv, linear = torch.randn(2, 8, 16, 16), torch.nn.Conv2d(8, 6, 3, padding=1), torch.nn.Linear(16, 5)
    own, geometry, plain = torch.ops.mkldnn, ([1, 1], [1, 1], [1, 1], 1), ("none", [], "")
    with torch.inference_mode():
        packed = own._reorder_convolution_weight(conv.weight, *geometry, list(x.shape))

        def work() -> None:
            out = own._convolution_pointwise(x, packed, conv.bias, *geometry, *plain)
            own._linear_pointwise(out, linear.weight, linear.bias, *plain)

        assert count(Job(work))[0].flops == count(Job(lambda: linear(conv(x))))[0].flops > 0


# ---- tables ---------------------------------------------------------------------------------------------------


def test_tables_say_what_was_measured(tmp_path: Path) -> None:
    way = Way("peer", slow)
    counts = Counts(flops=4 * 10**9, calls=2, copies=1, copied=10**6, float64=0, waits=0, least_bytes=10**9)
    result = Result(row(way, way, bar=0.5), [(2.0, 4.0), (3.0, 4.0), (9.0, 10.0)], [(2.0**30, 2.0**31)] * 3, 1e-5,
                    (counts, counts))  # fmt: skip
    (line,) = command.times_table([result])[2:]
    assert "| 3.00 s | 4.00 s | 0.75 (bar 0.5) | 0.50 to 0.90 | 1 GiB | 2 GiB | 0.50 | 1e-05 |" in line
    line = command.limits_table([result], Settings("tiny", "cpu", tmp_path), [(1e9, 1e9), (2e9, 5e8)])[-1]
    assert line == "| row | 4.0 | 4.0 | 1.00 | 2.00 s | 67% | 50% |"
    assert "| 2 / 2 | 1 / 1 | 1 / 1 | 0 / 0 | 0 / 0 |" in command.counts_table([result])[-1]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n", encoding="utf-8")
    command.write(readme, ["new"])
    assert readme.read_text(encoding="utf-8") == f"before\n{command.BEGIN}\nnew\n{command.END}\nafter\n"
    command.write(tmp_path / "table.md", ["new"])
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == "new\n"


def test_a_row_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "rates", lambda device, dtype: (2e9, 1e9))
    words = ["--size", "tiny", "--rows", "assign_16", "--rounds", "2", "--write", str(tmp_path / "table.md")]
    bench.main(words)
    said = capsys.readouterr().out
    assert "| assign_16 | noise assignment, batch 16 | cdist and SciPy |" in said
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__.partition('+')[0]}" in table and table.splitlines()[-3] in said
    bench.main(["--size", "tiny", "--rows", "knn_16", "--profile"])
    assert "knn_16, drawing the noises alone" in (said := capsys.readouterr().out) and "aten::normal_" in said
    with pytest.raises(UserError, match="--rows: 'unets' is none of unet, unet_compiled"):
        bench.main(["--rows", "unets"])


@pytest.mark.parametrize("part", bench.PARTS, ids=lambda part: part.__name__.rpartition(".")[2])
def test_every_file_of_rows_is_a_program(part: ModuleType) -> None:
    help_ = subprocess.run([sys.executable, str(part.__file__), "--help"], capture_output=True, text=True, check=True)
    names = [row.name for row in part.rows(Settings("full", "cpu", Path("nowhere")))]
    assert names and set(names) <= {row.name for row in bench.rows(Settings("full", "cpu", Path("nowhere")))}
    assert "--rows NAME" in help_.stdout and part.__doc__.splitlines()[0] in help_.stdout


def test_compiled_networks_are_measured_on_a_gpu_or_when_they_are_asked_for() -> None:
    usual = [
        {row.name for row in command.choose(bench.rows(Settings("tiny", device, Path("nowhere"))), None)}
        for device in ("cpu", "cuda")
    ]
    assert usual[1] - usual[0] == {"unet_compiled", "compiling"} and usual[0] < usual[1]
    (row,) = command.choose(ALL, ["compiling"])
    assert row.asked


def test_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Settings) -> None:
    words = ["--size", "tiny", "--rounds", "1", "--folder", str(settings.folder), "--out", str(tmp_path)]
    growth.main([*words, "--axes", "batch", "images"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("| 1 |", "| 2 |", "| 5 |", "| 50 |"))]
    assert [row[3] for row in rows] == ["1.00", "2.00", "1.00", "10.00"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth-batch.png", "growth-images.png"]
    with pytest.raises(UserError, match="--rounds must be at least 1"):
        growth.main([*words, "--rounds", "0"])
