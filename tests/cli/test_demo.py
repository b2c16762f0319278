"""The demo and the study of adapters, on the shipped model with hardly any training."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.errors import UserError
from tests.cli.sampling_model import main_of
from tests.programs import run_warm


def test_the_demo_tunes_draws_and_reports(tmp_path: Path) -> None:
    words = ["--steps", 2, "--prior_images", 2, "--others", 5, "--sampling_steps", 2, "--outdir", tmp_path]
    result = run_warm("scripts/demo.py", *words)
    assert result.returncode == 0, result.stderr
    report = dict(line.split("  ", 1) for line in result.stdout.splitlines() if line[:1].islower() and "  " in line)
    assert set(report) >= {"subject similarity", "unrelated prompts", "parameters trained", "time", "adapters"}
    assert "before" in report["subject similarity"] and "of the U-Net's 7,014,532" in report["parameters trained"]
    assert f"scripts/webui.py --adapters {report['adapters'].strip()}" in result.stdout
    assert (Path(report["adapters"].strip()) / "adapter_config.json").is_file()
    assert len(list((tmp_path / "photos" / "ball").glob("*.png"))) == 5
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 5 * 144 and picture.height > 5 * 144


def test_the_study_compares_goes_on_and_says_who_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seeds", 0, "--adapter_lrs", 2e-3, "--unet_lrs", 1e-4, "--steps", 2, "--prior_images", 2]
    words += ["--pictures", 2, "--others", 2, "--sampling_steps", 2, "--outdir", tmp_path]
    yaml = tmp_path / "small.yaml"
    yaml.write_text(Path("configs/tiny/dreambooth.yaml").read_text().replace("batch_size: 8", "batch_size: 1"))
    words += ["--base", yaml]
    study = main_of("scripts/adapter_study.py")
    study([str(word) for word in words])
    table = (tmp_path / "table.md").read_text()
    assert "| adapters | 0.002 (best) |" in table and "| whole U-Net | 0.0001 (best) |" in table
    assert "(adapters - base) / (whole U-Net - base) = " in table
    record = json.loads((tmp_path / "adapter-0.002-0.json").read_text())
    assert 0 < record["share"] < 0.02 and record["trained"] == 132248
    capsys.readouterr()
    study([str(word) for word in words])
    assert "Run 1 of 2" not in capsys.readouterr().out, "finished runs are kept"
    assert (tmp_path / "table.md").read_text() == table
    yaml.write_text(yaml.read_text() + "# another yaml\n")
    study([str(word) for word in words])
    assert "Run 1 of 2" in capsys.readouterr().out, "runs under another yaml are made anew"


def test_the_best_rate_is_the_most_similar_and_of_adapters_one_that_other_prompts_can_bear() -> None:
    study = main_of("scripts/adapter_study.py")
    runs = [(1e-3, 0.8, 0.0), (2e-3, 0.9, -0.01), (2e-3, 0.9, -0.08), (4e-3, 0.95, -0.2)]
    records = [
        {"method": method, "learning_rate": rate, "similarity_after": similarity, "accuracy_change": change}
        for method in ("adapters", "whole U-Net")
        for rate, similarity, change in runs
    ]
    best_rate = sys.modules[study.__module__].best_rate
    assert best_rate(records, "adapters") == 2e-3, "on the average of the seeds, 5 points at most"
    assert best_rate(records, "whole U-Net") == 4e-3


@pytest.mark.parametrize("script", ["scripts/demo.py", "scripts/adapter_study.py"])
def test_what_is_measured_is_not_trained_on(script: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--others 380 and --prior_images 96 need 440 captions"):
        main_of(script)(["--others", "380", "--outdir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("scripts/demo.py", ["--steps", "0"], "--steps 0: must be at least 1"),
        ("scripts/demo.py", ["--others", "0"], "--others 0: must be at least 1"),
        ("scripts/demo.py", ["--ckpt", "nowhere.ckpt"], "--ckpt: there is no file 'nowhere.ckpt'"),
        ("scripts/demo.py", ["--subject", "cat"], "subject 'cat' is unknown; choose one of ball, flower, house"),
        ("scripts/adapter_study.py", ["--unet_lrs", "2"], "--unet_lrs: learning rates lie between 0 and 1"),
    ],
)
def test_bad_flags_are_one_line(script: str, words: list[str], message: str) -> None:
    result = run_warm(script, *words)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) <= 2
