"""README's "Use your own checkpoint" and "From Python", followed to the letter, with small random models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm import identify
from ldm.checkpoint import read_state_dict
from ldm.exchange.folder import write_folder
from ldm.util import instantiate_from_config
from ldm.weight_files import StateDict, write_tensors
from tests.cli.sampling_model import ROOT, YAML, main_of
from tests.goldens.fill import fill

README = ROOT / "README.md"
INPAINTING = {
    "target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "params": {"conditioning_key": "hybrid", "unet_config": {"params": {"in_channels": 9}}},
}
V2_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
V2 = {
    "params": {
        "parameterization": "v",
        "unet_config": {"params": {"context_dim": 64, "use_linear_in_transformer": True}},
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"layer": "penultimate", "architecture": {"embed_dim": 64, "text_cfg": V2_TEXT}},
        },
    }
}
# The yaml files of the repository that the commands lean on, as small as their models are here.
YAMLS = {"v1-inference.yaml": {}, "v1-inpainting-inference.yaml": INPAINTING, "v2-inference-v.yaml": V2}
# And how these small models are told: (width, channels of the input, width of the text).
SHAPES = {(32, 4, 32): ("v1-inference.yaml",), (32, 9, 32): ("v1-inpainting-inference.yaml",)}


def blocks(heading: str, language: str = "") -> str:
    """The fenced blocks of a section of README, in one."""
    text = README.read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"README has no section '{heading}'"
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL))


def commands() -> list[list[str]]:
    lines = blocks("Use your own checkpoint").replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def small_config(name: str) -> DictConfig:
    config = OmegaConf.create(YAML)
    if "cond_stage_config" in YAMLS[name].get("params", {}):
        del config.model.params.cond_stage_config
    return OmegaConf.merge(config, {"model": YAMLS[name]})


def random_weights(config: DictConfig) -> StateDict:
    torch.manual_seed(0)
    model = instantiate_from_config(config.model)
    fill(model.model)  # zero-initialised layers would hide the prompt
    return model.state_dict()


def write_here(folder: Path, cache: Path) -> None:
    """Everything that README takes for granted: checkpoints, pictures, the hub's cache."""
    configs = {name: small_config(name) for name in YAMLS}
    for name, config in configs.items():
        (folder / "configs" / "stable-diffusion").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "configs" / "stable-diffusion" / name)
    weights = {name: random_weights(config) for name, config in configs.items()}
    models = folder / "models"
    (models / "tiny").mkdir(parents=True)
    OmegaConf.save(configs["v1-inference.yaml"], models / "tiny" / "config.yaml")
    write_tensors(weights["v1-inference.yaml"], models / "tiny" / "model.safetensors", "safetensors")
    write_tensors(weights["v1-inference.yaml"], models / "v1-5-pruned-emaonly.safetensors", "safetensors")
    write_tensors(weights["v1-inpainting-inference.yaml"], models / "sd-v1-5-inpainting.ckpt", "ckpt")
    write_tensors(weights["v2-inference-v.yaml"], models / "v2-1_768-ema-pruned.safetensors", "safetensors")
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): 2 * v for k, v in weights["v1-inference.yaml"].items() if k.startswith(prefix)}
    write_tensors(vae, models / "vae-ft-mse-840000-ema-pruned.ckpt", "ckpt")
    kept = cache / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    write_folder(weights["v1-inference.yaml"], configs["v1-inference.yaml"], kept / "snapshots" / "0123abcd")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123abcd")
    Image.effect_noise((40, 32), 60).convert("RGB").save(folder / "photo.png")
    mask = np.zeros((32, 40), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(folder / "mask.png")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is the working directory; no network."""
    folder, cache = tmp_path / "here", tmp_path / "hub"
    write_here(folder, cache)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(identify, "CONFIGS", folder / "configs" / "stable-diffusion")
    monkeypatch.setattr(identify, "KNOWN", SHAPES)
    return folder


def drawn(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(the model's name in the picture's settings, the picture), in the order of drawing."""
    pictures = [Image.open(path) for path in sorted(folder.rglob("samples/*.png"))]
    names = [re.search(r"Model: (.*?)(?:,|$)", image.info["parameters"])[1] for image in pictures]
    return [(name, np.asarray(image)) for name, image in zip(names, pictures, strict=True)]


def test_own_checkpoints_are_used_to_the_letter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    programs: dict[str, Callable[[list[str]], Any]] = {}
    for python, script, *arguments in commands():
        assert python == "python"
        programs.setdefault(script, main_of(script))
        programs[script](arguments)
        said = capsys.readouterr().out
        assert "unexpected" not in said and "missing" not in said

    pictures = drawn(here / "outputs" / "txt2img-samples")
    names = [name for name, _ in pictures]
    assert names == ["v1-5-pruned-emaonly", "v2-1_768-ema-pruned", "stable-diffusion-v1-5", "v1-5-pruned-emaonly",
                     "my-pipeline"]  # fmt: skip
    v1, v2, hub, other_vae, folder = (picture for _, picture in pictures)
    assert np.array_equal(v1, hub) and np.array_equal(v1, folder)
    assert not np.array_equal(v1, v2) and not np.array_equal(v1, other_vae)
    ((name, redrawn),) = drawn(here / "outputs" / "inpaint-samples")
    inside = np.asarray(Image.open("mask.png"))[..., None] == 255
    assert name == "sd-v1-5-inpainting"
    assert np.array_equal(np.where(inside, 0, redrawn), np.where(inside, 0, np.asarray(Image.open("photo.png"))))

    half = read_state_dict("models/sd-v1-5-inpainting.safetensors")
    assert half["model.diffusion_model.out.2.weight"].dtype == torch.float16
    before, after = (read_state_dict(f"models/{n}") for n in ("v1-5-pruned-emaonly.safetensors", "my-model.ckpt"))
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_from_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks("From Python", "python"), names)
    assert "50 of 50" in capsys.readouterr().out
    star = Image.open("star.png")
    assert star.size == (32, 32) and "Seed: 1," in star.info["parameters"]
    assert [picture.settings.seed for picture in names["more"]] == [5, 6, 7, 8]
    before, after = np.asarray(star), np.asarray(names["changed"][0].image)
    assert np.array_equal(before[:, 16:], after[:, 16:]) and not np.array_equal(before[:, :16], after[:, :16])
    other = read_state_dict("models/vae-ft-mse-840000-ema-pruned.ckpt")
    assert torch.equal(names["model"].first_stage_model.decoder.conv_out.weight, other["decoder.conv_out.weight"])
