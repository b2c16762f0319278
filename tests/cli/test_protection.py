"""Safety checker and watermark on the command line, with a small model whose yaml calls for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import safety, watermark
from ldm.checkpoint import read_state_dict
from ldm.errors import UserError
from ldm.exchange.folder import write_folder
from ldm.util import load_yaml
from tests.checkers import write_checker
from tests.cli.sampling_model import main_of, write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Stable Diffusion is protected, and two checkers."""
    folder = tmp_path_factory.mktemp("protected")
    config, _ = write_model(folder)
    config.write_text(config.read_text(encoding="utf-8") + "\nsafety_checker: true\n", encoding="utf-8")
    write_checker(folder / "passes", 2.0)
    write_checker(folder / "blocks", -2.0)
    return folder


def draw(files: Path, outdir: Path, *flags: object, size: int = 32) -> list[Image.Image]:
    """What txt2img writes as its single pictures."""
    words = ["--config", files / "model.yaml", "--ckpt", files / "model.ckpt", "--outdir", outdir, "--ddim_steps", 1]
    words += ["--n_samples", 1, "--n_iter", 1, "--H", size, "--W", size, *flags]
    main_of("scripts/txt2img.py")([str(word) for word in words])
    return [Image.open(path) for path in sorted((outdir / "samples").glob("*.png"))]


def test_without_weights_nothing_is_drawn(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    safety.load_checker.cache_clear()
    out = tmp_path / "out"
    with pytest.raises(UserError, match="safety checker: there are no weights.*--no_safety_checker"):
        draw(files, out)
    assert not out.exists()
    (picture,) = draw(files, out, "--no_safety_checker")
    assert np.asarray(picture).any()


def test_a_blocked_picture_is_black_and_told(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (picture,) = draw(files, tmp_path / "a", "--safety_checker", files / "blocks", "--seed", 7)
    assert not np.asarray(picture).any()
    assert "blocked the picture of seed 7" in capsys.readouterr().out
    (picture,) = draw(files, tmp_path / "b", "--safety_checker", files / "passes", "--seed", 7)
    assert np.asarray(picture).any()
    said = capsys.readouterr().out
    assert "blocked the picture" not in said and "too small for the watermark" in said


def test_a_pipelines_own_checker_is_asked(files: Path, tmp_path: Path) -> None:
    state = read_state_dict(files / "model.ckpt")
    write_folder(state, load_yaml(files / "model.yaml"), tmp_path / "pipeline")
    write_checker(tmp_path / "pipeline", -2.0, pipeline=True)
    (picture,) = draw(files, tmp_path / "out", "--ckpt", tmp_path / "pipeline")
    assert not np.asarray(picture).any()


def test_pictures_and_grids_carry_the_watermark(files: Path, tmp_path: Path) -> None:
    (picture,) = draw(files, tmp_path / "a", "--no_safety_checker", size=256)
    (grid,) = (tmp_path / "a").glob("grid-*.png")
    (plain,) = draw(files, tmp_path / "b", "--no_safety_checker", "--no_watermark", size=256)
    assert watermark.find(picture) == watermark.find(Image.open(grid)) == watermark.MESSAGE
    assert watermark.find(plain) is None
