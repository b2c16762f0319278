import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.sampling_model import run, write_model

SCRIPT = "scripts/evaluate.py"


def test_a_model_is_measured_and_the_pictures_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    config, checkpoint = write_model(tmp_path)
    words = [SCRIPT, "--config", config, "--ckpt", checkpoint, "--device", "cpu", "--n", 5, "--ddim_steps", 3]
    reports = []
    for batch_size in (5, 2):
        outdir = tmp_path / f"out{batch_size}"
        result = run(*words, "--batch_size", batch_size, "--outdir", outdir)
        assert result.returncode == 0, result.stderr
        assert "never seen in training" in result.stdout and "everything" in result.stdout
        reports.append(json.loads((outdir / "accuracy.json").read_text()))
        with Image.open(outdir / "pictures.png") as grid:
            assert grid.width > 5 * 128
    assert reports[0]["pictures"] == reports[1]["pictures"]
    assert len(reports[0]["pictures"]) == 5 and set(reports[0]["accuracy"]) >= {"shape", "all"}
    assert reports[0]["settings"]["sampler"] == "plms"


def test_the_reader_is_reported_without_a_model(tmp_path: Path) -> None:
    result = run(SCRIPT, "--reader-check")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("100.0%") == 5 and "shuffled" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "--config: there is no file 'nowhere.yaml'"),
        (["--n", "0"], "--n 0: must be at least 1"),
        (["--ddim_step", "5"], "unrecognized arguments: --ddim_step 5"),
        (["--sampler", "euler"], "--sampler: invalid choice: 'euler'"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_end_in_one_line(words: list[str], message: str) -> None:
    result = run(SCRIPT, *words)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
