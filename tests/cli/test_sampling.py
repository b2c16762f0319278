"""txt2img.py, img2img.py and sample.py as users call them, on a small random model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from tests.cli.sampling_model import ROOT, main_of, run, write_model

SCRIPTS = ("scripts/txt2img.py", "scripts/img2img.py", "sample.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags that name a small random model."""
    config, checkpoint = write_model(tmp_path_factory.mktemp("model"))
    return ["--config", config, "--ckpt", checkpoint, "--device", "cpu", "--ddim_steps", 3]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick(script: str) -> None:
    run(script, "--help")  # warms the disk's cache
    start = time.perf_counter()
    done = run(script, "--help")
    assert done.returncode == 0
    assert time.perf_counter() - start < 2.0
    for flag in ("--adapter_path", "--negative_prompt", "--from-file", "--precision"):
        assert flag in done.stdout


def test_without_weights_says_what_to_do() -> None:
    done = run("scripts/txt2img.py", "--plms", "--prompt", "a photograph of an astronaut")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "models/ldm/stable-diffusion-v1/model.ckpt" in done.stderr
    command = "python scripts/txt2img.py --plms --prompt "
    assert command in done.stderr
    assert "--config models/tiny/config.yaml --ckpt models/tiny/model.safetensors" in done.stderr


def test_txt2img_writes_numbered_pictures_with_their_settings(model: list, tmp_path: Path) -> None:
    words = ["scripts/txt2img.py", *model, "--outdir", tmp_path, "--plms", "--prompt", "a red circle, big"]
    words += ["--n_samples", 2, "--n_iter", 2, "--seed", 7, "--negative_prompt", "blur"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"{i:05}.png" for i in range(4)]
    third = Image.open(tmp_path / "samples" / "00002.png")
    assert third.size == (32, 32)
    assert third.info["parameters"] == (
        "a red circle, big\nNegative prompt: blur\n"
        "Steps: 3, Sampler: PLMS, CFG scale: 7.5, Seed: 9, Size: 32x32, Model: model"
    )
    grid = Image.open(tmp_path / "grid-0000.png")
    assert grid.size == (2 * 34 + 2, 2 * 34 + 2)
    np.testing.assert_array_equal(np.asarray(grid)[2:34, 2:34], np.asarray(Image.open(tmp_path / "samples/00000.png")))

    done = run("sample.py", *model, "--outdir", tmp_path, "--seed", 9, "--n_iter", 1, "--prompt", "a red circle, big")
    assert done.returncode == 0, done.stderr
    again = Image.open(tmp_path / "samples" / "00004.png")  # goes on where the first run stopped
    assert "Sampler: DPM++ 2M" in again.info["parameters"]
    assert (tmp_path / "grid-0001.png").is_file()


def test_img2img(model: list, tmp_path: Path) -> None:
    photo = Image.new("RGBA", (45, 70), (200, 30, 30, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "photo.png", exif=exif)
    words = [*model, "--init-img", tmp_path / "photo.png", "--outdir", tmp_path, "--seed", 3]
    done = run("scripts/img2img.py", *words, "--strength", 0.6)
    assert done.returncode == 0, done.stderr
    made = Image.open(tmp_path / "samples" / "00001.png")
    assert made.size == (64, 40)  # turned, then down to multiples of 8
    assert "Denoising strength: 0.6" in made.info["parameters"]
    assert "Seed: 4" in made.info["parameters"]


def test_prompts_from_a_file(model: list, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\nein Hünd\na bird\n", encoding="utf-8")
    words = [*model, "--from-file", tmp_path / "prompts.txt", "--outdir", tmp_path, "--n_iter", 1, "--skip_grid"]
    cli.run(main_of("scripts/txt2img.py"), [*map(str, words), "--n_samples", "2"])
    files = sorted((tmp_path / "samples").iterdir())
    texts = [Image.open(file).info["parameters"].splitlines()[0] for file in files]
    assert texts == ["a cat", "ein Hünd", "a bird"]
    assert not list(tmp_path.glob("grid*"))


def test_runs_from_another_directory(model: list, tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / "txt2img.py", "--ckpt", "nowhere.ckpt", cwd=tmp_path)
    assert done.returncode == 2
    assert "--config: there is no file" in done.stderr
