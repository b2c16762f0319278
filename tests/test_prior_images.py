"""Prior images: as many as are asked for, exact however often drawing was stopped, and other ones refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm import prior_images
from ldm.data.personalized_dream import PersonalizedBase
from ldm.errors import UserError
from ldm.generation import SETTINGS
from ldm.inference import txt2img
from ldm.loading import load_model
from ldm.prior_images import Drawing

CONFIG, CKPT = "models/tiny/config.yaml", "models/tiny/model.safetensors"
DRAWING = Drawing(steps=2, seed=5, batch_size=2)
PROMPTS = ["a photo of a toy", "a red circle"]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model(CONFIG, CKPT, "cpu")


def test_what_is_lacking_is_drawn_and_nothing_twice(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    assert prior_images.make(lambda: tiny, folder, PROMPTS, 3, {"ckpt": "x"}, DRAWING) == 3
    first = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    (folder / "prior-00001.png").unlink()
    assert prior_images.make(lambda: tiny, folder, PROMPTS, 4, {"ckpt": "x"}, DRAWING) == 2
    assert all((folder / name).read_bytes() == content for name, content in first.items())
    alone = txt2img(tiny, [PROMPTS[1]], seed=8, sampler="dpm_solver", steps=2, scale=1.0, progress=False)[0]
    assert Image.open(folder / "prior-00003.png").tobytes() == alone.image.tobytes()
    photos = PersonalizedBase(str(folder), size=64, reg=True)
    assert photos.captions == PROMPTS * 2
    with pytest.raises(UserError, match="--reg_data_root.*ckpt was x and is y"):
        prior_images.make(lambda: tiny, folder, PROMPTS, 5, {"ckpt": "y"}, DRAWING)
    assert prior_images.make(pytest.fail, folder, PROMPTS, 4, {"ckpt": "x"}, DRAWING) == 0


@pytest.fixture
def enough(tiny: Any, tmp_path: Path) -> Path:
    """A folder in which nothing is lacking."""
    prior_images.make(lambda: tiny, tmp_path / "prior", PROMPTS, 2, {"ckpt": "x"}, DRAWING)
    return tmp_path / "prior"


@pytest.mark.parametrize(
    ("prompts", "ckpt", "drawing", "said"),
    [
        (["a photo of a cat"], "x", DRAWING, "prompts was .* and is"),
        (PROMPTS, "y", DRAWING, "ckpt was x and is y"),
        (PROMPTS, "x", replace(DRAWING, scale=3.0), "scale was 1.0 and is 3.0"),
    ],
)
def test_others_are_refused_also_where_nothing_is_lacking(
    prompts: list[str], ckpt: str, drawing: Drawing, said: str, enough: Path
) -> None:
    with pytest.raises(UserError, match=f"--reg_data_root.*{said}"):
        prior_images.make(pytest.fail, enough, prompts, 2, {"ckpt": ckpt}, drawing)


def test_another_seeds_and_peoples_own_are_taken_where_nothing_is_lacking(enough: Path) -> None:
    assert prior_images.make(pytest.fail, enough, PROMPTS, 2, {"ckpt": "x"}, replace(DRAWING, seed=6)) == 0
    (enough / SETTINGS).unlink()
    assert prior_images.make(pytest.fail, enough, ["a photo of a cat"], 2, {"ckpt": "y"}, DRAWING) == 0


def test_a_resumed_run_keeps_what_it_began_with(enough: Path) -> None:
    config = OmegaConf.load("configs/personalize/tiny-lora.yaml")
    config.data.params.reg.params.data_root = str(enough)
    flags = {"num_reg_images": 2, "actual_resume": CKPT, "train": True, "reg_prompts": None, "seed": 5}
    run = SimpleNamespace(options=SimpleNamespace(**flags, reg_steps=25, reg_scale=1.0), config=config)
    run.resume_from = enough / "last.ckpt"
    prior_images.for_run(run)
    run.resume_from = None
    with pytest.raises(UserError, match="--reg_data_root.*are others"):
        prior_images.for_run(run)


def test_how_many_are_lacking(tmp_path: Path) -> None:
    assert prior_images.lacking(tmp_path / "no", None) == prior_images.ENOUGH
    assert prior_images.lacking(tmp_path / "no", 7) == 7
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "prior-00000.png")
    assert prior_images.lacking(tmp_path, None) == 0
    assert prior_images.lacking(tmp_path, 10) == 7 and prior_images.lacking(tmp_path, 2) == 0


def test_a_run_whose_loss_has_no_prior_gets_none_and_one_without_a_model_is_told(tmp_path: Path) -> None:
    config = OmegaConf.load("configs/personalize/tiny-lora.yaml")
    config.data.params.reg.params.data_root = str(tmp_path / "prior")
    options = SimpleNamespace(num_reg_images=2, actual_resume="", train=True)
    run = SimpleNamespace(options=options, config=config, resume_from=None)
    with pytest.raises(UserError, match="--actual_resume"):
        prior_images.for_run(run)
    config.model.params.reg_weight = 0.0
    prior_images.for_run(run)
    assert not (tmp_path / "prior").exists()


def test_the_base_model_of_a_run_has_none_of_its_additions(tiny: Any) -> None:
    for name in ("configs/tiny/dreambooth.yaml", "configs/personalize/tiny-pivotal.yaml"):
        base = load_model(prior_images.base_config(OmegaConf.load(name)), CKPT, "cpu")
        theirs, ours = (
            [p.image.tobytes() for p in txt2img(m, PROMPTS, sampler="dpm_solver", steps=2, scale=1.0, progress=False)]
            for m in (tiny, base)
        )
        assert theirs == ours
