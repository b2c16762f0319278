"""main_dream_booth.py as a person runs it, on photographs of every awkward kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from tests.programs import run_warm

BASE = ["--base", "configs/tiny/dreambooth.yaml"]


def main(*words):
    return run_warm("main_dream_booth.py", *words, CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A turned JPEG, a PNG with alpha, a grey one, an odd aspect, and a file that was cut off."""
    folder = tmp_path_factory.mktemp("photos")
    cat = Image.fromarray(skimage.data.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif)
    rgba = Image.fromarray(skimage.data.astronaut()).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.arange(512, dtype=np.uint16) // 2, (512, 1)).astype(np.uint8)))
    rgba.save(folder / "alpha.png")
    Image.fromarray(skimage.data.camera()).save(folder / "grey.png")
    cat.crop((0, 0, 400, 120)).save(folder / "wide.png")
    data = (folder / "turned.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(data[: len(data) // 3])
    return folder


def test_training_leaves_adapters_named_by_their_step(photos, tmp_path):
    words = ["-t", "--scale_lr", "False", "--max_steps", 3, "-n", "cat", "--gpus", "0,", "--class_word", "cat"]
    small = ["data.params.batch_size=2", "lightning.modelcheckpoint.params.every_n_train_steps=2",
             "lightning.callbacks.image_logger.params.batch_frequency=3",
             "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=2"]  # fmt: skip
    result = main(*BASE, *small, *words, "--data_root", photos, "--reg_data_root", photos,
                 "-l", tmp_path / "logs")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "broken.jpg" in result.stdout + result.stderr
    assert "No CUDA device here" in result.stdout
    (directory,) = (tmp_path / "logs").iterdir()
    assert directory.name.startswith(photos.name) and directory.name.endswith("_cat")
    checkpoints = directory / "checkpoints"
    assert {p.name for p in checkpoints.glob("*-adapters")} == {"2-adapters", "3-adapters"}
    manifest = json.loads((checkpoints / "3-adapters" / "adapter_config.json").read_text())
    assert manifest["trained_on"]["class_word"] == "cat" and manifest["trained_on"]["steps"] == 3
    assert list((directory / "images" / "train").glob("instance_samples_gs-000003*.png"))
    assert list((directory / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data_root", "no-such-folder"], "no-such-folder"),
        ([], "--data_root"),
        (["--data_root", "tests/cli", "--init_word", "dog"], "add embeder to model.params.train_level"),
        (["--colour_word", "red"], "--colour_word"),
        (["--data_root", "tests/goldens"], "tests/goldens"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, message, tmp_path):
    result = main(*BASE, "-t", *words, "-l", tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not list(Path(tmp_path).iterdir())


def test_an_adapter_entry_that_cannot_be_names_its_key(photos, tmp_path):
    override = (
        "model.params.unet_config.params.adapter_config.transformer_adp_config=[{din: ffno, dout: attn1i, mid_dim: 4}]"
    )
    result = main(*BASE, "-t", "--data_root", photos, override, "-l", tmp_path)
    assert result.returncode == 2
    assert "transformer_adp_config[0].dout" in result.stderr and "transo" in result.stderr
