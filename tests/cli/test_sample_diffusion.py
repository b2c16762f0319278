"""scripts/sample_diffusion.py on small random models of the zoo, as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.cli_unprompted import PUBLISHED, find_source, parser
from ldm.errors import UserError
from tests.checkers import write_checker
from tests.cli.sampling_model import main_of
from tests.programs import run
from tests.zoo import ZOO, build, noise, small_config

SCRIPT = "scripts/sample_diffusion.py"


def write(folder: Path, name: str, edit: Any = None) -> Path:
    """A folder with model.ckpt and config.yaml, as the zoo's archives have them."""
    config = small_config(ZOO / "latent-diffusion" / f"{name}.yaml")
    if edit is not None:
        edit(config)
    folder.mkdir()
    save_checkpoint(build(config).state_dict(), folder / "model.ckpt")
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models: unconditional, by class and by image."""
    root = tmp_path_factory.mktemp("models")
    for name in ("celebahq-ldm-vq-4", "cin256-v2", "bsr_sr"):
        write(root / name, name)
    (root / "empty").mkdir()
    (root / "bare").mkdir()
    (root / "bare" / "model.ckpt").write_bytes((root / "bsr_sr" / "model.ckpt").read_bytes())
    noise("RGB", 8, 16).save(root / "small.png")
    noise("RGB", 9, 16).save(root / "odd.png")
    return root


def sample(*words: object) -> None:
    main_of(SCRIPT)([str(word) for word in words])


def written(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The pictures of the only run in a folder, and the same from its .npz."""
    (made,) = folder.glob("samples/model/*")
    names = [path.name for path in sorted((made / "img").iterdir())]
    assert names == [f"sample_{i:06}.png" for i in range(len(names))]
    (numbers,) = (made / "numpy").iterdir()
    with np.load(numbers) as file:
        stacked = file["arr_0"]
    assert numbers.name == f"{'x'.join(map(str, stacked.shape))}-samples.npz"
    return [np.asarray(Image.open(made / "img" / name)) for name in names], stacked


def test_unconditional(models: Path, tmp_path: Path) -> None:
    common = ("-r", models / "celebahq-ldm-vq-4", "-c", 2, "-e", 1.0, "-l", tmp_path)
    sample(*common, "-n", 3, "--batch_size", 2)
    folder = tmp_path / "celebahq-ldm-vq-4"
    pictures, numbers = written(folder)
    assert numbers.shape == (3, 32, 32, 3) and numbers.dtype == np.uint8
    assert np.array_equal(np.stack(pictures), numbers)
    assert not np.array_equal(pictures[0], pictures[1])
    (settings,) = folder.glob("samples/model/*/sampling_config.yaml")
    assert OmegaConf.load(settings).custom_steps == 2
    alone = tmp_path / "alone"
    sample(*common[:-1], alone, "-n", 1, "--seed", 44)
    last = written(alone / "celebahq-ldm-vq-4")[0][0]
    assert np.abs(last.astype(int) - pictures[2]).max() <= 1


def test_all_timesteps_and_the_models_own_folder(models: Path) -> None:
    sample("-r", models / "celebahq-ldm-vq-4" / "model.ckpt", "-n", 1, "-v", "model.params.image_size=16")
    pictures, _ = written(models / "celebahq-ldm-vq-4")
    assert [picture.shape for picture in pictures] == [(64, 64, 3)]


def test_by_class(models: Path, tmp_path: Path) -> None:
    common = ("-r", models / "cin256-v2", "-c", 2, "-e", 0, "-n", 2, "--seed", 3)
    runs: dict[str, list[np.ndarray]] = {}
    for name, flags in (
        ("two", ("--classes", "25,187")),
        ("first", ("--classes", "25")),
        ("guided", ("--classes", "25,187", "--scale", 3, "--null_class", 1000)),
        ("to itself", ("--classes", "25", "--scale", 3, "--null_class", 25)),
    ):
        sample(*common, "-l", tmp_path / name, *flags)
        runs[name] = written(tmp_path / name / "cin256-v2")[0]
    assert np.array_equal(runs["two"][0], runs["first"][0]) and not np.array_equal(runs["two"][1], runs["first"][1])
    assert not np.array_equal(runs["two"][0], runs["guided"][0])
    assert np.abs(runs["to itself"][0].astype(int) - runs["first"][0]).max() <= 1


def test_by_image(models: Path, tmp_path: Path) -> None:
    sample("-r", models / "bsr_sr", "--image", models / "small.png", "-n", 1, "-c", 2, "-l", tmp_path / "a")
    sample("-r", models / "bsr_sr", "--image", models / "small.png", "-n", 1, "-c", 2, "-l", tmp_path / "b",
           "--vae_tiling", "--attention_slicing")  # fmt: skip
    whole, sliced = (written(tmp_path / name / "bsr_sr")[1] for name in "ab")
    assert whole.shape == (1, 64, 32, 3) and np.array_equal(whole, sliced)  # smaller than a tile


def test_a_checker_is_asked_when_the_yaml_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wanted(config: DictConfig) -> None:
        config.safety_checker = True

    folder = write(tmp_path / "checked", "celebahq-ldm-vq-4", wanted)
    common = ("-r", folder, "-n", 1, "-c", 1)
    with pytest.raises(UserError, match="safety checker.*--no_safety_checker"):
        sample(*common, "--safety_checker", tmp_path)
    assert not (folder / "samples").exists()
    sample(*common, "--no_safety_checker")
    assert written(folder)[0][0].any() and "too small for the watermark" in capsys.readouterr().out
    write_checker(tmp_path / "blocks", -2.0)
    sample(*common, "--safety_checker", tmp_path / "blocks", "-l", tmp_path / "b")
    assert not written(tmp_path / "b" / "checked")[0][0].any()
    assert "blocked sample_000000.png" in capsys.readouterr().out


BAD_INPUTS = {
    "no model": ([], ["--resume", "model.ckpt"]),
    "nowhere": (["-r", "{}/none"], ["none"]),
    "empty folder": (["-r", "{}/empty"], ["model.ckpt", "empty"]),
    "no yaml": (["-r", "{}/bare"], ["config.yaml", "--config"]),
    "another yaml": (["-r", "{}/bare", "--config", "{}/celebahq-ldm-vq-4/config.yaml", "-c", "2"], ["does not fit"]),
    "no samples": (["-r", "{}/bsr_sr", "-n", "0"], ["--n_samples 0"]),
    "no number": (["-r", "{}/bsr_sr", "-n"], ["--n_samples"]),
    "eta": (["-r", "{}/bsr_sr", "-e", "2"], ["--eta 2", "between 0 and 1"]),
    "steps": (["-r", "{}/celebahq-ldm-vq-4", "-c", "30"], ["--custom_steps 30", "20 timesteps"]),
    "checker or none": (["-r", "{}/bsr_sr", "--safety_checker", "x", "--no_safety_checker"], ["exclude each other"]),
    "unknown flag": (["-r", "{}/bsr_sr", "--plms"], ["--plms"]),
    "no override": (["-r", "{}/bsr_sr", "x"], ["x", "key.subkey=value"]),
    "classes of none": (["-r", "{}/celebahq-ldm-vq-4", "--classes", "3"], ["--classes", "led by nothing"]),
    "image of none": (["-r", "{}/cin256-v2", "--image", "{}/small.png"], ["--image", "led by class"]),
    "no class": (["-r", "{}/cin256-v2", "--classes", "2000"], ["class 2000", "0 to 1000"]),
    "no class number": (["-r", "{}/cin256-v2", "--classes", "cat"], ["--classes cat"]),
    "guidance to nothing": (["-r", "{}/cin256-v2", "--scale", "3"], ["--null_class"]),
    "guidance of none": (["-r", "{}/celebahq-ldm-vq-4", "--scale", "3"], ["cannot be guided"]),
    "no image": (["-r", "{}/bsr_sr"], ["--image", "LR_image"]),
    "image missing": (["-r", "{}/bsr_sr", "--image", "{}/none.png"], ["none.png"]),
    "image's size": (["-r", "{}/bsr_sr", "--image", "{}/odd.png"], ["9x16", "multiples of"]),
    "logdir is a file": (["-r", "{}/celebahq-ldm-vq-4", "-c", "2", "-l", "{}/small.png"], ["--logdir", "cannot write"]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_ends_in_one_line(name: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = BAD_INPUTS[name]
    try:
        sample(*(word.format(models) for word in words))
    except UserError as error:
        message = str(error)
    except SystemExit as left:
        message = capsys.readouterr().err.strip()
        assert left.code == 2
    else:
        raise AssertionError("no error")
    assert "\n" not in message and all(word in message for word in said), message


def test_a_run_of_ones_own_is_trained_and_drawn_from(tmp_path: Path) -> None:
    """main.py on the zoo's yaml and a folder of photos; then its run's folder is named as it is."""
    import main

    for i in range(2):
        noise("RGB", 32, 32, seed=i).save(tmp_path / f"{i}.png")
    config = small_config(ZOO / "latent-diffusion" / "celebahq-ldm-vq-4.yaml")
    config.model.params.use_ema = True
    for part in ("train", "validation"):
        config.data.params[part].params.update(data_root=str(tmp_path), size=32)
    config.data.params.update(batch_size=2, num_workers=0)
    OmegaConf.save(config, tmp_path / "small.yaml")
    logs = tmp_path / "logs"
    main.main(["--base", str(tmp_path / "small.yaml"), "-t", "--max_steps", "2", "-l", str(logs), "--gpus", "0"])
    (folder,) = logs.iterdir()
    sample("-r", folder, "-n", 1, "-c", 2)
    assert len(list(folder.glob("samples/last/*/img/sample_000000.png"))) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_need_no_yaml_beside_them(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model.ckpt").touch()
    (config,) = find_source(parser().parse_args(["-r", str(folder)])).configs
    assert config.is_file() and f"models/ldm/{name} " in config.read_text(encoding="utf-8")


def test_captions_are_led_elsewhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "text", "text2img256")
    with pytest.raises(UserError, match=r"led by 'caption'; scripts/txt2img\.py"):
        sample("-r", folder, "-n", 1)


def test_the_program_shows_its_flags_quickly_and_fails_with_2() -> None:
    shown = run(SCRIPT, "--help")
    assert shown.returncode == 0 and "--custom_steps" in shown.stdout
    failed = run(SCRIPT, "-r", "nowhere")
    assert failed.returncode == 2 and failed.stderr.startswith("error: -r/--resume") and not failed.stdout
