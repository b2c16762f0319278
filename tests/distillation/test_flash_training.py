"""Runs of Flash Diffusion by main.py: small checkpoints, an exact resume, pictures, and the LoRA's file in txt2img."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from ldm import cli
from ldm.errors import UserError
from ldm.exchange import lora as files
from ldm.loading import load_model
from ldm.run import add_flags, read_run
from ldm.training import train
from ldm.util import load_yaml
from tests.cli.sampling_model import main_of, write_model
from tests.training_runs import assert_equal, folder, last, load

SMALL = Path(__file__).with_name("flash_small.yaml")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(the training's yaml, the teacher's yaml, its checkpoint)."""
    root = tmp_path_factory.mktemp("teacher")
    config, checkpoint = write_model(root)
    training, model = load_yaml(SMALL), load_yaml(config).model.params
    for part in ("unet_config", "first_stage_config", "cond_stage_config"):
        training.model.params.teacher_config.params[part] = model[part]
    path = root / "flash.yaml"
    OmegaConf.save(training, path)
    return path, config, checkpoint


def fit(logs: Path, *words: Any) -> Any:
    """A run of main.py inside of this process."""
    parser = cli.ArgumentParser()
    add_flags(parser)
    return train(read_run(parser.parse_intermixed_args(["-t", "-l", str(logs), *map(str, words)])))


def begin(logs: Path, teacher: tuple[Path, Path, Path], *words: Any) -> Any:
    training, _, checkpoint = teacher
    return fit(logs, "--base", training, "--scale_lr", "False", "-n", "run", "--actual_resume", checkpoint, *words)


@pytest.fixture(scope="module")
def whole(teacher: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs of a run that was never stopped, by the command of the readme; `out` and `err` are what it said."""
    root = tmp_path_factory.mktemp("whole")
    training, _, checkpoint = teacher
    words = ["--base", training, "-t", "--scale_lr", "False", "--actual_resume", checkpoint, "-l", root / "logs"]
    with (root / "out").open("w") as out, (root / "err").open("w") as err, redirect_stdout(out), redirect_stderr(err):
        main_of("main.py")([*map(str, words), "-n", "run"])
    return root / "logs"


def test_a_run_is_taken_up_exactly(teacher: tuple[Path, Path, Path], whole: Path, tmp_path: Path) -> None:
    begin(tmp_path, teacher, "--max_steps", 4)
    fit(tmp_path, "--resume", folder(tmp_path), "--max_steps", 6)
    assert_equal(last(tmp_path), last(whole))
    a, b = (load_file(folder(logs) / "checkpoints" / "6-lora.safetensors") for logs in (tmp_path, whole))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_checkpoints_hold_what_is_trained_and_pictures_are_there(whole: Path) -> None:
    state = last(whole)["state_dict"]
    assert all(key.startswith(("student.", "discriminator.", "model_ema.")) for key in state)
    assert all(".lora_" in key for key in state if key.startswith("student."))
    assert load(folder(whole) / "checkpoints" / "000000006.ckpt")["global_step"] == 6
    (picture,) = (folder(whole) / "images" / "train").glob("teacher_2_student_4_2_1_gs-000004*.png")
    assert picture.stat().st_size > 0
    assert list(folder(whole).rglob("events.out.tfevents*"))


def test_the_file_is_the_average_of_the_lora(teacher: tuple[Path, Path, Path], whole: Path) -> None:
    model = load_model(teacher[1], teacher[2], "cpu")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    written = files.read(folder(whole) / "checkpoints" / "6-lora.safetensors", model.yaml_params, shapes)
    state = last(whole)["state_dict"]
    for key, value in written.items():
        shadow = key.removeprefix("model.diffusion_model.").replace("lora_A.", "lora_A.default.")
        shadow = shadow.replace("lora_B.", "lora_B.default.")
        assert torch.equal(value, state[f"model_ema.{shadow.replace('.', '')}"])
    assert any(value.abs().sum() > 0 for key, value in written.items() if "lora_B" in key)


def test_txt2img_and_convert_take_the_file(teacher: tuple[Path, Path, Path], whole: Path, tmp_path: Path) -> None:
    _, config, checkpoint = teacher
    lora, merged = folder(whole) / "checkpoints" / "6-lora.safetensors", tmp_path / "merged.safetensors"
    words = ["--config", str(config), "--sampler", "lcm", "--ddim_steps", "2", "--scale", "1", "--n_samples", "1"]
    words += ["--n_iter", "1", "--skip_grid", "--no_safety_checker"]
    draw = main_of("scripts/txt2img.py")
    draw([*words, "--ckpt", str(checkpoint), "--lora", f"{lora}:0.7", "--outdir", str(tmp_path / "a")])
    main_of("scripts/convert.py")([str(checkpoint), str(merged), "--config", str(config), "--lora", f"{lora}:0.7"])
    draw([*words, "--ckpt", str(merged), "--outdir", str(tmp_path / "b")])
    a, b = (Image.open(tmp_path / name / "samples" / "00000.png").tobytes() for name in "ab")
    models = [load_model(config, checkpoint, "cpu", artefacts={lora: 0.7}), load_model(config, merged, "cpu")]
    for x, y in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(x, y)
    assert a == b
    with pytest.raises(UserError, match="--lora: there is no file"):
        draw([*words, "--ckpt", str(checkpoint), "--lora", "nothing.safetensors", "--outdir", str(tmp_path / "c")])
    with pytest.raises(UserError, match="the strength must be a number"):
        draw([*words, "--ckpt", str(checkpoint), "--lora", f"{lora}:nan", "--outdir", str(tmp_path / "c")])


def test_a_teacher_is_needed_and_must_fit(teacher: tuple[Path, Path, Path], tmp_path: Path) -> None:
    training, config, checkpoint = teacher
    with pytest.raises(UserError, match="--actual_resume"):
        fit(tmp_path, "--base", training, "--scale_lr", "False")
    state = torch.load(checkpoint)["state_dict"]
    part = {k: v for k, v in state.items() if "first_stage" not in k}
    larger = state | {"model.diffusion_model.input_blocks.9.0.op.weight": torch.zeros(1)}
    for other, said in ((part, "missing: first_stage_model"), (larger, "unexpected: model.diffusion_model.input")):
        torch.save({"state_dict": other}, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match=f"is not of the yaml's teacher: {said}"):
            fit(tmp_path, "--base", training, "--scale_lr", "False", "--actual_resume", tmp_path / "other.ckpt")


def test_it_trains_on_a_cache_of_latents_and_texts(teacher: tuple[Path, Path, Path], tmp_path: Path) -> None:
    training, _, checkpoint = teacher
    cache = tmp_path / "cache"
    main_of("scripts/cache_latents.py")(["--base", str(training), "--ckpt", str(checkpoint), "--outdir", str(cache)])
    begin(tmp_path / "logs", teacher, "--max_steps", 1, f"data.params.cache_latents={cache}")
    assert last(tmp_path / "logs")["global_step"] == 1


def test_the_command_of_the_readme_tells_what_it_does(whole: Path) -> None:
    assert "LoRA of step 6" in (whole.parent / "out").read_text()
    assert "Training" in (whole.parent / "err").read_text()
