"""A student of the tiny model from main.py to pictures, adapters and diffusers, as a person takes it there."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from benchmarks.kill import differences
from ldm.errors import UserError
from ldm.loading import load_model
from ldm.util import load_yaml
from tests.cli.sampling_model import ROOT, main_of
from tests.networks import relative_error
from tests.pipelines import libraries

BASE = "configs/distill/tiny-tiny.yaml"
TEACHER = "models/tiny/model.safetensors"
SMALL = [
    "data.params.batch_size=2", "data.params.train.params.length=6", "model.params.noise_config.params.method=knn",
    "model.params.noise_config.target=ldm.modules.noise.ImmiscibleNoise", "lightning.trainer.logger=false",
    "lightning.modelcheckpoint.params.every_n_train_steps=2", "lightning.trainer.accumulate_grad_batches=2",
    "lightning.callbacks.image_logger.params.batch_frequency=3",
    "lightning.callbacks.image_logger.params.max_images=1",
    "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, and in `part` one of the same that was taken up after two."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--base", BASE, *SMALL, "model.params.ckpt_path=null", "model.params.teacher_config.ckpt_path=null",
             "-t", "--scale_lr", "False", "--actual_resume", TEACHER, "-n", "student"]  # fmt: skip
    main, said = main_of("main.py"), StringIO()
    with redirect_stdout(said):
        main([*words, "--max_steps", "3", "-l", str(root / "whole")])
    assert "3,262,724 of its U-Net's 7,014,532 parameters are the student's" in said.getvalue()
    assert f"The teacher is the U-Net of {TEACHER}" in said.getvalue()
    main([*words, "--max_steps", "2", "-l", str(root / "part")])
    (part,) = (root / "part").iterdir()
    main(["--resume", str(part), "-t", "--max_steps", "3"])
    return root


def folder(logs: Path) -> Path:
    (only,) = logs.iterdir()
    return only


def test_a_resumed_run_finds_its_teacher_and_goes_on_exactly(runs: Path) -> None:
    checkpoints = (torch.load(folder(runs / name) / "checkpoints/last.ckpt", weights_only=True) for name in
                   ("whole", "part"))  # fmt: skip
    whole, part = checkpoints
    for key in ("global_step", "state_dict", "optimizer_states", "place"):
        assert not list(differences(whole[key], part[key], key))
    student = load_yaml(BASE).model.params.unet_config.params
    assert sum(v.numel() for k, v in whole["state_dict"].items() if k.startswith("model.")) == 3_262_724
    assert not any("teacher" in key for key in whole["state_dict"]) and not student.use_middle_block
    pictures = {path.name.partition("_gs")[0] for path in (folder(runs / "whole") / "images/train").iterdir()}
    assert {"samples", "teacher_samples"} <= pictures


def test_a_teacher_that_is_gone_is_one_line(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    (moved / "checkpoints").mkdir(parents=True)
    (moved / "configs").mkdir()
    (moved / "checkpoints/last.ckpt").hardlink_to(folder(runs / "whole") / "checkpoints/last.ckpt")
    config = load_yaml(folder(runs / "whole") / "configs/project.yaml", overrides=["base_checkpoint=gone.ckpt"])
    OmegaConf.save(config, moved / "configs/project.yaml")
    with pytest.raises(UserError, match="'gone.ckpt'; say with --actual_resume where it is now"):
        main_of("main.py")(["--resume", str(moved), "-t", "--max_steps", "4"])
    with pytest.raises(UserError, match="the teacher's checkpoint is missing"):
        main_of("main.py")(["--base", BASE, *SMALL, "model.params.ckpt_path=null", "-l", str(tmp_path / "logs"),
                            "model.params.teacher_config.ckpt_path=null", "-t"])  # fmt: skip


def test_pictures_need_the_runs_yaml_and_checkpoint_alone(runs: Path, tmp_path: Path) -> None:
    student = folder(runs / "whole")
    config = load_yaml(student / "configs/project.yaml", overrides=["model.params.teacher_config.ckpt_path=gone.ckpt"])
    OmegaConf.save(config, tmp_path / "project.yaml")
    main_of("scripts/txt2img.py")(
        ["--config", str(tmp_path / "project.yaml"), "--ckpt", str(student / "checkpoints/last.ckpt"), "--prompt",
         "a large red circle on a white background", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1",
         "--skip_grid", "--outdir", str(tmp_path / "out"), "--device", "cpu"]
    )  # fmt: skip
    (picture,) = (tmp_path / "out/samples").glob("*.png")
    assert Image.open(picture).size == (64, 64)


def test_a_student_goes_to_diffusers_and_back(runs: Path, tmp_path: Path) -> None:
    student = folder(runs / "whole")
    config, ckpt = (str(student / name) for name in ("configs/project.yaml", "checkpoints/last.ckpt"))
    convert = main_of("scripts/convert.py")
    convert([ckpt, str(tmp_path / "there"), "--config", config])
    convert([str(tmp_path / "there"), str(tmp_path / "back.safetensors")])
    unet = json.loads((tmp_path / "there/unet/config.json").read_text())
    assert unet["mid_block_type"] is None and unet["layers_per_block"] == 1 and len(unet["down_block_types"]) == 2
    model, again = load_model(config, ckpt, "cpu"), load_model(None, tmp_path / "back.safetensors", "cpu")
    ours, back = model.model.state_dict(), again.model.state_dict()
    assert ours.keys() == back.keys() and all(torch.equal(value, back[key]) for key, value in ours.items())
    peer = libraries()[0].UNet2DConditionModel.from_pretrained(tmp_path / "there/unet").eval()
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([7, 731]), torch.randn(2, 77, 128)
    with torch.no_grad():
        expected = peer(x, t, encoder_hidden_states=context).sample
        assert relative_error(model.apply_model(x, t, context), expected) < 1e-4


def test_a_flash_student_of_a_student_draws_in_diffusers_too(runs: Path, tmp_path: Path) -> None:
    student = folder(runs / "whole")
    config, ckpt = (str(student / name) for name in ("configs/project.yaml", "checkpoints/last.ckpt"))
    unet = [f"model.params.teacher_config.params.unet_config.params.{setting}" for setting in
            ("channel_mult=[1,2]", "use_middle_block=false")]  # fmt: skip
    words = ["--base", "configs/distill/flash-tiny.yaml", "-t", "--scale_lr", "False", "--actual_resume"]
    small = ["data.params.batch_size=2", "data.params.train.params.length=4", "model.params.teacher_steps=2",
             "lightning.trainer.logger=false", "lightning.callbacks.image_logger.params.disabled=true"]  # fmt: skip
    main = main_of("main.py")
    with pytest.raises(UserError, match="does not fit this yaml|is not of the yaml's teacher"):
        main([*words, ckpt, *small, "-l", str(tmp_path / "wrong")])  # the U-Net of the whole tiny model
    main([*words, ckpt, *unet, *small, "--max_steps", "1", "-l", str(tmp_path / "logs")])
    (lora,) = (tmp_path / "logs").glob("*/checkpoints/1-lora.safetensors")
    with pytest.raises(UserError, match=r"output_blocks.*is \[128, 128\] in the network, and \[64, 64\] in the file"):
        load_model("models/tiny/config.yaml", TEACHER, "cpu", artefacts={lora: 1.0})
    main_of("scripts/convert.py")([ckpt, str(tmp_path / "there"), "--config", config])
    peer = libraries()[0].UNet2DConditionModel.from_pretrained(tmp_path / "there/unet").eval()
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([7, 731]), torch.randn(2, 77, 128)
    plain, few = (load_model(config, ckpt, "cpu", artefacts=worn) for worn in (None, {lora: 20.0}))
    peer.load_lora_adapter(load_file(lora), prefix="unet", adapter_name="flash")
    peer.set_adapters("flash", 20.0)  # after one step it does little
    with torch.no_grad():
        expected = peer(x, t, encoder_hidden_states=context).sample
        assert relative_error(few.apply_model(x, t, context), expected) < 1e-4
        assert relative_error(plain.apply_model(x, t, context), expected) > 1e-3


def test_a_student_takes_adapters_by_dreambooth(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "photos/one.png")
    ckpt = str(folder(runs / "whole") / "checkpoints/last.ckpt")
    unet = ["model.params.unet_config.params.channel_mult=[1,2]",
            "model.params.unet_config.params.use_middle_block=false"]  # fmt: skip
    main_of("main_dream_booth.py")(
        ["--base", "configs/tiny/dreambooth.yaml", *unet, "data.params.batch_size=1", "lightning.trainer.logger=false",
         "lightning.callbacks.image_logger.params.disabled=true", "-t", "--scale_lr", "False", "--max_steps", "1",
         "--actual_resume", ckpt, "--data_root", str(tmp_path / "photos"), "--class_word", "toy",
         "-l", str(tmp_path / "logs"), "-n", "toy"]
    )  # fmt: skip
    (adapters,) = (tmp_path / "logs").glob("*/checkpoints/1-adapters")
    model = load_model(ROOT / BASE, ckpt, "cpu", adapter_path=adapters)
    assert len(list(model.model.diffusion_model.adapter_parameters())) == 4 * 6
