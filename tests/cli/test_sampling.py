"""txt2img.py, img2img.py, inpaint.py and sample.py as users call them, on a small random model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from tests.cli.sampling_model import main_of, write_model
from tests.pipelines import pipeline
from tests.programs import ROOT, run

SCRIPTS = ("scripts/txt2img.py", "scripts/img2img.py", "scripts/inpaint.py", "sample.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags that name a small random model."""
    config, checkpoint = write_model(tmp_path_factory.mktemp("model"))
    return ["--config", config, "--ckpt", checkpoint, "--device", "cpu", "--ddim_steps", 3]


def draw(script: str, *words: object) -> list[Image.Image]:
    """Run a program here, and open what is then in its --outdir, in the order of the numbers."""
    argv = [str(word) for word in words]
    cli.run(main_of(script), argv)
    folder = Path(argv[argv.index("--outdir") + 1]) / "samples"
    return [Image.open(file) for file in sorted(folder.iterdir())]


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

    *_, again = draw("sample.py", *model, "--outdir", tmp_path, "--seed", 9, "--n_iter", 1, "--prompt", "a red circle")
    assert Path(again.filename).name == "00004.png"  # goes on where the first run stopped
    assert "Sampler: DPM++ 2M" in again.info["parameters"]
    assert (tmp_path / "grid-0001.png").is_file()


def test_a_picture_does_not_depend_on_how_many_are_drawn(model: list, tmp_path: Path) -> None:
    words = [*model, "--prompt", "a cat", "--dpm_solver", "--skip_grid"]
    one_by_one = draw("scripts/txt2img.py", *words, "--outdir", tmp_path / "a", "--n_samples", 1, "--n_iter", 3)
    together = draw("scripts/txt2img.py", *words, "--outdir", tmp_path / "b", "--n_samples", 3, "--n_iter", 1)
    at_once = draw("scripts/txt2img.py", *words, "--outdir", tmp_path / "c", "--n_iter", 1, "--batched")
    for mine, same, near in zip(one_by_one, together, at_once, strict=True):
        assert mine.tobytes() == same.tobytes()
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(near)).max() <= 1
    assert one_by_one[0].tobytes() != one_by_one[1].tobytes()
    fixed = draw("scripts/txt2img.py", *words, "--outdir", tmp_path / "d", "--n_samples", 1, "--fixed_code")
    assert [picture.tobytes() for picture in fixed] == [one_by_one[0].tobytes()] * 2


def test_every_way_to_draw(model: list, tmp_path: Path) -> None:
    words = [*model, "--outdir", tmp_path, "--n_samples", 1, "--n_iter", 1, "--skip_grid", "--H", 40, "--W", 24]
    words += ["--dpm_solver", "--dpm_algorithm", "dpmsolver", "--dpm_order", 3, "--dpm_method", "singlestep"]
    words += ["--dpm_spacing", "logSNR", "--dpm_thresholding", "--precision", "bf16", "--attention_slicing"]
    words += ["--vae_tiling", "--vae", model[3], "--clip_skip", 1, "--prompt_weighting", "--prompt", "a (cat:1.2)"]
    (picture,) = draw("scripts/txt2img.py", *words)
    assert picture.size == (24, 40)
    assert picture.info["parameters"] == (
        "a (cat:1.2)\nSteps: 3, Sampler: DPM 3S, CFG scale: 7.5, Seed: 42, Size: 24x40, Model: model, VAE: model, "
        'Clip skip: 1, Emphasis: No norm, Solver: "spacing logSNR, thresholding True", Precision: bf16'
    )


@pytest.mark.parametrize(
    ("flags", "title"),
    [
        (["--sampler", "dpmpp_2m", "--schedule", "karras"], "DPM++ 2M Karras"),
        (["--sampler", "dpmpp_sde", "--schedule", "sgm_uniform"], "DPM++ SDE SGM Uniform"),
        (["--sampler", "dpm_fast"], "DPM fast"),
        (["--sampler", "plms", "--plms"], "PLMS"),
    ],
)
def test_samplers_by_name_sign_as_the_web_ui_does(model: list, tmp_path: Path, flags: list[str], title: str) -> None:
    words = [*model, "--n_samples", 1, "--n_iter", 1, "--skip_grid", "--prompt", "a cat", "--outdir", tmp_path]
    (picture,) = draw("scripts/txt2img.py", *words, *flags)
    assert f"Steps: 3, Sampler: {title}, CFG scale: 7.5, Seed: 42, " in picture.info["parameters"]
    assert "Eta" not in picture.info["parameters"]


def test_what_a_sampler_is_told_is_signed_too(model: list, tmp_path: Path) -> None:
    words = [*model, "--n_samples", 1, "--n_iter", 1, "--skip_grid", "--prompt", "a cat", "--outdir", tmp_path]
    churn = ["--s_churn", 5, "--s_tmin", 0.1, "--s_tmax", 9, "--s_noise", 1.1, "--schedule", "karras", "--rho", 5]
    *_, churned = draw("scripts/txt2img.py", *words, "--sampler", "heun", *churn)
    assert churned.info["parameters"].endswith(
        "Sampler: Heun Karras, CFG scale: 7.5, Seed: 42, Size: 32x32, Model: model, Sigma churn: 5, Sigma tmin: 0.1, "
        "Sigma tmax: 9, Sigma noise: 1.1, Schedule rho: 5"
    )
    made = {}
    for eta in ([], ["--eta", 1], ["--eta", 0]):
        *_, made[str(eta)] = draw("scripts/txt2img.py", *words, "--sampler", "euler_ancestral", *eta)
    plain, one, none = made.values()
    assert plain.tobytes() == one.tobytes() != none.tobytes()
    assert plain.info["parameters"] == one.info["parameters"] and "Eta: 0" in none.info["parameters"]
    assert "Sampler: Euler a, " in plain.info["parameters"]


def test_what_is_cut_off_a_long_prompt_is_said_once(
    model: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", " ".join(["dog"] * 75) + " and a Cat", "--n_samples", 2, "--n_iter", 2]
    assert len(draw("scripts/txt2img.py", *model, "--outdir", tmp_path, *words)) == 4
    message = "warning: the prompt is longer than 75 tokens; left out: 'and a Cat'"
    assert capsys.readouterr().err.count(message) == 1


def test_a_diffusers_folder_needs_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline("v1", tmp_path / "parts").save_pretrained(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)  # where no yaml is
    words = ["--ckpt", "owner/name", "--device", "cpu", "--ddim_steps", 3, "--n_samples", 1, "--n_iter", 1]
    (picture,) = draw("scripts/txt2img.py", *words, "--outdir", "out", "--prompt", "a cat", "--plms")
    assert picture.size == (32, 32)
    assert "Model: name" in picture.info["parameters"]


def test_inpaint(model: list, tmp_path: Path) -> None:
    photo = Image.effect_noise((45, 70), 60).convert("RGB")
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", photo.size)
    mask.paste(255, (10, 20, 30, 60))
    mask.save(tmp_path / "mask.png")
    words = [*model, "--init-img", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--prompt", "a hat"]
    pictures = draw("scripts/inpaint.py", *words, "--outdir", tmp_path, "--dpm_solver")
    pictures += draw("scripts/inpaint.py", *words, "--outdir", tmp_path / "more", "--sampler", "heun", "--n_samples", 1)
    assert len(pictures) == 3
    hole = np.asarray(mask) == 255
    for picture in pictures:
        assert picture.size == photo.size
        np.testing.assert_array_equal(np.asarray(picture)[~hole], np.asarray(photo)[~hole])
        assert (np.asarray(picture)[hole] != np.asarray(photo)[hole]).mean() > 0.5
    assert "Sampler: DPM++ 2M" in pictures[0].info["parameters"]
    assert "Denoising strength: 1" in pictures[0].info["parameters"]


@pytest.mark.parametrize("flags", [["--plms"], ["--dpm_solver"], ["--sampler", "dpmpp_2m_sde", "--eta", 0.5]])
def test_img2img_with_other_samplers(model: list, tmp_path: Path, flags: list[object]) -> None:
    Image.effect_noise((32, 32), 60).save(tmp_path / "photo.png")
    words = [*model, *flags, "--init-img", tmp_path / "photo.png", "--outdir", tmp_path, "--n_samples", 1]
    (picture,) = draw("scripts/img2img.py", *words)
    assert picture.size == (32, 32)
    assert ("Eta: 0.5" in picture.info["parameters"]) == ("--eta" in flags)


def test_img2img(model: list, tmp_path: Path) -> None:
    photo = Image.new("RGBA", (45, 70), (200, 30, 30, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "photo.png", exif=exif)
    words = [*model, "--init-img", tmp_path / "photo.png", "--outdir", tmp_path, "--seed", 3]
    made = draw("scripts/img2img.py", *words, "--strength", 0.6)[1]
    assert made.size == (64, 40)  # turned, then down to multiples of 8
    assert "Denoising strength: 0.6" in made.info["parameters"]
    assert "Seed: 4" in made.info["parameters"]


def test_prompts_from_a_file(model: list, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\nein Hünd\na bird\n", encoding="utf-8")
    words = [*model, "--from-file", tmp_path / "prompts.txt", "--outdir", tmp_path, "--n_iter", 1, "--skip_grid"]
    pictures = draw("scripts/txt2img.py", *words, "--n_samples", 2)
    assert [picture.info["parameters"].splitlines()[0] for picture in pictures] == ["a cat", "ein Hünd", "a bird"]
    assert not list(tmp_path.glob("grid*"))


def test_runs_from_another_directory(model: list, tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / "txt2img.py", "--ckpt", "nowhere.ckpt", cwd=tmp_path)
    assert done.returncode == 2
    assert "--ckpt: there is no file" in done.stderr


def test_the_old_model_of_laion_has_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(main_of("scripts/txt2img.py"), ["--laion400m", "--prompt", "a cat"])
    assert stop.value.code == 2
    assert "--ckpt: there is no file 'models/ldm/text2img-large/model.ckpt'" in capsys.readouterr().err
