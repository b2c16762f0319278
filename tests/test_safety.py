"""The safety checker's real loading code on small random weights, and the watermark with the package's decoder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import skimage
import torch
from imwatermark import WatermarkDecoder
from PIL import Image

from ldm import safety, watermark
from ldm.errors import UserError
from ldm.inference import load_model, txt2img
from ldm.loading import build_model
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from ldm.safety import Protection
from ldm.util import load_yaml
from tests.checkers import write_checker
from tests.cli.sampling_model import ROOT, write_model

NOISE = Image.effect_noise((64, 64), 60).convert("RGB")


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of the published file, which is older than the installed transformers."""
    level = "vision_model."
    named = {f"{level}{k}" if k.startswith(level) and not k.startswith(2 * level) else k: v for k, v in state.items()}
    return named | {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}


@pytest.mark.parametrize("pipeline", [False, True], ids=["folder", "pipeline"])
@pytest.mark.parametrize("threshold", [2.0, -2.0], ids=["passes", "blocks"])
def test_a_checker_is_loaded_and_asked(tmp_path: Path, threshold: float, pipeline: bool) -> None:
    write_checker(tmp_path, threshold, pipeline)
    assert safety.SafetyChecker(str(tmp_path)).flags([NOISE, NOISE.resize((40, 32))]) == [threshold < 0] * 2


def test_the_published_file_is_read_whole(tmp_path: Path) -> None:
    state = write_checker(tmp_path, 2.0)
    (tmp_path / "model.safetensors").unlink()
    torch.save(published(state), tmp_path / "pytorch_model.bin")
    loaded = safety.SafetyChecker(str(tmp_path)).model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_checker_that_would_let_everything_pass_is_refused(tmp_path: Path) -> None:
    state = write_checker(tmp_path, -2.0)
    (tmp_path / "model.safetensors").unlink()
    key = "visual_projection.weight"
    for name, change, reason in (
        ("lacking", lambda s: s.pop(key), f"no fitting weights '{key}'"),
        ("misshapen", lambda s: s.update({key: torch.zeros(3, 3)}), "visual_projection|mismatch"),
        ("no numbers", lambda s: s[key].fill_(torch.nan), "no numbers"),
        ("half", lambda s: s.update({k: v.half() for k, v in s.items()}), None),
    ):
        changed = {k: v.clone() for k, v in state.items()}
        change(changed)
        torch.save(changed, tmp_path / "pytorch_model.bin")
        safety.load_checker.cache_clear()
        if reason is None:
            assert safety.load_checker(str(tmp_path)).flags([NOISE]) == [True], name
            continue
        with pytest.raises(UserError, match=f"(?s)safety checker.*({reason}).*--no_safety_checker"):
            safety.load_checker(str(tmp_path))


@pytest.mark.parametrize("width", [768, 1024], ids=["v1", "v2"])
def test_it_is_on_for_both_versions_and_fails_closed(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=SimpleNamespace(context_dim=width)), cond_stage_model=None
    )
    safety.load_checker.cache_clear()
    with pytest.raises(UserError, match="no weights in models/safety-checker/; get them with .*--no_safety_checker"):
        Protection.of(model)
    write_checker(tmp_path / safety.LOCAL_CHECKER, -2.0)
    protection = Protection.of(model)
    assert protection.checker.flags([NOISE]) == [True] and protection.watermark
    safety.load_checker.cache_clear()


def test_the_models_width_calls_for_it_or_its_yaml(tmp_path: Path) -> None:
    sd = build_model(load_yaml(ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"))
    small = build_model(load_yaml(write_model(tmp_path)[0]))
    yes, no = {"safety_checker": True}, {"safety_checker": False}
    marked = Protection(None, watermark=True)
    assert Protection.of(sd, checker=False) == Protection.of(small, yes, checker=False) == marked
    assert Protection.of(small) == Protection.of(sd, no) == Protection()


def test_what_no_checker_is_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (str(tmp_path), str(tmp_path / "none"), "nobody/has-this-model"):
        with pytest.raises(UserError, match=r"safety checker: .* cannot be loaded .*--no_safety_checker"):
            safety.load_checker(source)


def test_a_blocked_picture_is_replaced_and_others_are_not(tmp_path: Path) -> None:
    config, ckpt = write_model(tmp_path)
    model = load_model(config, ckpt, "cpu")
    quick = {"steps": 1, "progress": False, "height": 32, "width": 32}
    for threshold in (2.0, -2.0):
        folder = tmp_path / f"{threshold:g}"
        write_checker(folder, threshold, pipeline=True)
        protection = Protection.of(model, {"safety_checker": True}, watermark=False, ckpt=folder)
        picture = txt2img(model, ["a"], protection=protection, **quick)[0]
        assert picture.blocked == (threshold < 0) and np.asarray(picture.image).any() == (threshold > 0)
        named = Protection.of(model, {"safety_checker": True}, checker=folder)
        assert named.checker is not None and named.watermark


# ---- watermark ---------------------------------------------------------------------------------------------


def photo(width: int = 512, height: int = 512) -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((width, height))


def decoded(path: Path, message: str) -> str:
    """What the package's own decoder reads from a file, as OpenCV opens it."""
    return WatermarkDecoder("bytes", 8 * len(message)).decode(cv2.imread(str(path)), "dwtDct").decode(errors="replace")


def test_the_packages_decoder_reads_what_a_model_of_either_version_writes(tmp_path: Path) -> None:
    with torch.device("meta"):
        v2 = FrozenOpenCLIPEmbedder(architecture={"embed_dim": 8, "text_cfg": {"width": 32, "heads": 2, "layers": 1}})
    unet = SimpleNamespace(diffusion_model=SimpleNamespace(context_dim=1024))
    for text_encoder, message in ((None, "StableDiffusionV1"), (v2, "SDV2")):
        model = SimpleNamespace(model=unet, cond_stage_model=text_encoder)
        images, blocked = Protection.of(model, checker=False).apply([photo(), photo(768, 512)])
        assert blocked == [False, False]
        for i, image in enumerate(images):
            image.save(tmp_path / f"{i}.png")
            assert decoded(tmp_path / f"{i}.png", message) == message
            assert watermark.find(image) == message and watermark.read(image, len(message)) == message
    assert watermark.find(photo()) is None


def test_some_wrong_bits_do_not_hide_it() -> None:
    """In small pictures the method itself may lose bits."""
    marked = watermark.embed(photo(256, 320))
    assert watermark.read(marked) != watermark.MESSAGE
    assert 1.0 > watermark.agreement(marked) > watermark.ENOUGH and watermark.find(marked) == watermark.MESSAGE
    assert watermark.agreement(photo()) < 0.7
    with pytest.raises(UserError, match="64x64 pixels are too few"):
        watermark.embed(photo(64, 64))


def test_the_command_says_which_pictures_carry_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("command", ROOT / "scripts" / "tests" / "test_watermark.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    names = [str(tmp_path / name) for name in ("v1.png", "v2.png", "plain.png", "small.png")]
    images = watermark.embed(photo()), watermark.embed(photo(), watermark.MESSAGE_V2), photo(), photo(64, 64)
    for name, image in zip(names, images, strict=True):
        image.save(name)
    command.main(names[:2])
    assert capsys.readouterr().out == f"{names[0]}: StableDiffusionV1\n{names[1]}: SDV2\n"
    with pytest.raises(SystemExit) as left:
        command.main(names)
    assert left.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [f"{names[2]}: no watermark", f"{names[3]}: too small for a watermark"]
    with pytest.raises(UserError, match="there is no file"):
        command.main([str(tmp_path / "none.png")])
