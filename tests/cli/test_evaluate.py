import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.shapes import render
from ldm.errors import UserError
from ldm.evaluation.scene_features import draw_scenes
from tests.cli.sampling_model import main_of, write_model
from tests.programs import run, run_warm

SCRIPT = "scripts/evaluate.py"


def test_a_model_is_measured_and_the_pictures_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    config, checkpoint = write_model(tmp_path)
    words = [SCRIPT, "--config", config, "--ckpt", checkpoint, "--device", "cpu", "--n", 5, "--ddim_steps", 3]
    reports = []
    for batch_size in (5, 2):
        outdir = tmp_path / f"out{batch_size}"
        result = run_warm(*words, "--batch_size", batch_size, "--outdir", outdir)
        assert result.returncode == 0, result.stderr
        assert "never seen in training" in result.stdout and "everything" in result.stdout
        reports.append(json.loads((outdir / "accuracy.json").read_text()))
        with Image.open(outdir / "pictures.png") as grid:
            assert grid.width > 5 * 128
    assert reports[0]["pictures"] == reports[1]["pictures"]
    assert len(reports[0]["pictures"]) == 5 and set(reports[0]["accuracy"]) >= {"shape", "all"}
    assert reports[0]["settings"]["sampler"] == "plms"


def test_the_reader_is_reported_without_a_model(tmp_path: Path) -> None:
    result = run_warm(SCRIPT, "--reader-check")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("100.0%") == 5 and "shuffled" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "--config: there is no file 'nowhere.yaml'"),
        (["--n", "0"], "--n 0: must be at least 1"),
        (["--ddim_step", "5"], "unrecognized arguments: --ddim_step 5"),
        (["--sampler", "eular"], "--sampler: invalid choice: 'eular'"),
        (["--schedule", "karras"], "--schedule karras: the sampler plms has its own steps"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_end_in_one_line(words: list[str], message: str) -> None:
    result = run(SCRIPT, *words)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


# ---- pictures that are there -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of scenes, the first one with a manifest."""
    root = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("a", "b")):
        _, scenes = draw_scenes(150, seed)
        rows = []
        for i, scene in enumerate(scenes):
            path = root / name / f"{i:06}.png"
            path.parent.mkdir(exist_ok=True)
            render(scene).save(path)
            rows.append({"file": path.name, "prompt": scene.caption, "seed": i})
        if name == "a":
            (root / name / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "a", root / "b"


def scores_of(outdir: Path, *words: object) -> dict[str, float]:
    main_of(SCRIPT)([*map(str, words), "--outdir", str(outdir), "--device", "cpu"])
    return json.loads((outdir / "scores.json").read_text())["scores"]


def test_folders_are_scored_against_each_other_and_against_statistics(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    statistics = tmp_path / "b.npz"
    words = ("--features", "tiny")
    scores = scores_of(tmp_path, "--pictures", a, "--reference", b, *words)
    assert set(scores) > {"FID (tiny features)", "KID (tiny features)", "prompt accuracy, shape"}
    assert scores["prompt accuracy, everything"] == 1.0
    assert "150 pictures of" in capsys.readouterr().out
    assert scores_of(tmp_path, "--pictures", b, "--statistics", statistics, *words) == {}
    by_statistics = scores_of(tmp_path, "--pictures", a, "--reference", statistics, *words)
    assert by_statistics["FID (tiny features)"] == pytest.approx(scores["FID (tiny features)"])
    assert "KID (tiny features)" not in by_statistics


def test_without_inception_the_tiny_net_measures_and_says_so(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    scores = scores_of(tmp_path, "--pictures", folders[0], "--reference", folders[1])
    assert "FID (tiny features)" in scores
    assert "Inception's weights are not here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "x"], "--reference: scores pictures that are there; name their folder with --pictures"),
        (["--pictures", "nowhere"], "--pictures: there is no folder 'nowhere'"),
        (["--pictures", "A", "--reference", "nowhere"], "--reference: there is no folder or .npz file 'nowhere'"),
        (["--pictures", "B"], "--pictures: nothing to score"),
        (["--pictures", "B", "--clip", "x"], "has neither manifest.jsonl nor .txt files with captions"),
        (["--pictures", "A", "--statistics", "x.txt"], "--statistics 'x.txt': must end in .npz"),
        (["--pictures", "A", "--inception", "nowhere"], "--inception: there is no file 'nowhere'"),
    ],
)
def test_mistakes_in_scoring_end_in_one_line(words, message, folders: tuple[Path, Path], tmp_path: Path) -> None:
    places = dict(zip("AB", map(str, folders), strict=True))
    with pytest.raises(UserError) as error:
        scores_of(tmp_path, *(places.get(word, word) for word in words))
    assert message in str(error.value) and "\n" not in str(error.value)
