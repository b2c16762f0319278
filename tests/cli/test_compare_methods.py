"""scripts/compare_methods.py: runs are made once, measured, told in a table and pictures, and ranked by a law."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.errors import UserError
from scripts import compare_methods as module
from scripts.compare_methods import main as compare
from tests.programs import run

SMALL = ["--steps", "2", "--prior_images", "2", "--pictures", "2", "--others", "2", "--sampling_steps", "2",
         "--seeds", "0", "--processes", "2"]  # fmt: skip


def records(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def test_runs_are_made_once_and_told_in_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(["--methods", "embedding", *SMALL, "--outdir", str(tmp_path)])
    first = records(tmp_path)
    assert list(first) == ["embedding-0.05-2-0"]
    compare(
        ["--methods", "embedding", "lora-text", "--learning_rates", "lora-text=3e-3", *SMALL, "--outdir", str(tmp_path)]
    )
    assert "1 of 2 runs are there" in capsys.readouterr().out
    both = records(tmp_path)
    assert both["embedding-0.05-2-0"] == first["embedding-0.05-2-0"], "a finished run is kept, its seconds too"
    word, lora = both.values()
    assert (word["parameters"], word["drift"]) == (4 * 128, 0.0), "four vectors of the text encoder's width"
    assert word["parameters"] < lora["parameters"] and 4 * lora["parameters"] < lora["size"]
    assert 4 * word["parameters"] < word["size"] < lora["size"]
    for one in both.values():
        assert one["seconds"] > 0 and one["memory"] > 2**20
        assert 0 <= one["similarity"] <= 1 and one["similarity_photos"] > 0.9
    table = (tmp_path / "table.md").read_text()
    assert "| untrained |" in table and "| textual inversion | 0.05 | 2 |" in table
    assert "| LoRA + text encoder | 0.003 | 2 |" in table and f"| {lora['parameters']:,} |" in table
    with Image.open(tmp_path / "pictures.png") as sheet, Image.open(tmp_path / "plane.png") as plane:
        assert sheet.height > 4 * 144 and plane.width > 500
    assert not list(tmp_path.glob("seed-0/runs/*")) and (tmp_path / "logs/embedding-0.05-2-0.log").is_file()
    capsys.readouterr()
    compare(
        ["--methods", "embedding", "lora-text", "--learning_rates", "lora-text=3e-3", *SMALL, "--outdir", str(tmp_path)]
    )
    assert "are there" not in capsys.readouterr().out and records(tmp_path) == both
    assert (tmp_path / "table.md").read_text() == table


def test_a_run_under_other_settings_is_another() -> None:
    options = module.parser().parse_args(["--methods", "lora", "--seeds", "0"])
    (trial,) = module.trials_of(options)
    settings = module.settings_of(options, trial)
    for words in (["--subject", "house"], ["--others", "9"], ["--prior_images", "9"], ["--sampling_steps", "9"],
                  ["--pictures", "9"], ["--features", "tests"], ["--ckpt", "README.md"]):  # fmt: skip
        changed = module.parser().parse_args(["--methods", "lora", "--seeds", "0", *words])
        assert module.settings_of(changed, trial) != settings, words
    assert settings["base"] == "configs/personalize/tiny-lora.yaml" and len(settings["base_sha256"]) == 64
    assert len({t.name for t in module.trials_of(module.parser().parse_args([]))}) == 21


def record(method: str, rate: float, seed: int, similarity: float, drift: float) -> dict:
    return {"method": method, "learning_rate": rate, "seed": seed, "similarity": similarity, "drift": drift}


def test_of_every_method_the_best_rate_and_the_best_method_first() -> None:
    runs = [("lora", 1e-3, 0.8, 0), ("lora", 2e-3, 0.9, 4), ("lora", 4e-3, 0.95, 9),
            ("unet", 1e-4, 0.92, 3), ("unet", 2e-4, 0.99, 5.5), ("embedding", 1e-2, 0.97, 8)]  # fmt: skip
    made = [record(m, rate, seed, s + 0.01 * seed, d + seed) for m, rate, s, d in runs for seed in (0, 1)]
    best = module.best_rows(module.rows_of(made))
    assert [(row.method, row.learning_rate) for row in best] == [("unet", 1e-4), ("lora", 2e-3), ("embedding", 1e-2)]
    assert best[0].similarity == pytest.approx(0.925) and best[0].drift == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--ckpt", "nowhere.ckpt"], "--ckpt: there is no file 'nowhere.ckpt'"),
        (["--subject", "cat"], "subject 'cat' is unknown; choose one of ball, flower, house"),
        (["--features", "nothing"], "--features: 'nothing' is neither tiny-world nor a folder"),
        (["--methods", "lora", "--learning_rates", "unet=1e-4"], "--learning_rates: unet is none of --methods lora"),
        (["--others", "380"], "--others 380 and --prior_images 192 need"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_run(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        compare([*words, "--outdir", str(tmp_path / "out")])
    assert message in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["lora", "lora=", "lora=x", "lora=0", "lora=1e-3,2", "cat=1e-3"])
def test_a_wrong_rate_is_one_line(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not METHOD=RATE,RATE"):
        module.rates(text)


def test_bad_flags_leave_with_code_2_and_one_line() -> None:
    result = run("scripts/compare_methods.py", "--learning_rates", "lora=2")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "rates between 0 and 1" in result.stderr
