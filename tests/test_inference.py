"""Pictures in Python: seeds, batches, adapters, image to image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm import loading
from ldm.errors import UserError
from ldm.inference import Geometry, img2img, load_model, load_model_from_config, txt2img
from ldm.modules import adapters
from ldm.util import load_yaml
from tests.cli.sampling_model import ROOT, write_model

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
QUICK = {"steps": 3, "progress": False}
ADAPTERS = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 4, "init": "default"}]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(files: tuple[Path, Path]) -> nn.Module:
    return load_model(*files, "cpu")


def arrays(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture.image) for picture in pictures]).astype(int)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("dpm_solver", 0.0)])
def test_a_picture_is_the_same_alone_and_in_any_batch(model: nn.Module, sampler: str, eta: float) -> None:
    prompts = ["a cat", "a dog", "a bird"]
    options = {**QUICK, "sampler": sampler, "eta": eta}
    together = arrays(txt2img(model, prompts, seed=5, **options))
    alone = arrays([txt2img(model, p, seed=5 + i, **options)[0] for i, p in enumerate(prompts)])
    np.testing.assert_array_equal(together, alone)
    assert np.abs(together[0] - together[1]).max() > 1
    at_once = arrays(txt2img(model, prompts, seed=5, batch_size=2, exact=False, **options))
    assert np.abs(at_once - alone).max() <= 1  # sums of another order may round another way


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_first_picture_starts_from_the_originals_noise(files: tuple[Path, Path], sampler: str, device: str) -> None:
    model, seen = load_model(*files, device), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    txt2img(model, "a cat", seed=11, scale=1.0, sampler=sampler, **QUICK)
    torch.manual_seed(11)  # the original: the global seed, then the start, where the model is
    assert torch.equal(seen[0], torch.randn(1, 4, 8, 8, device=device))


def test_prompt_negative_prompt_and_seed_matter(model: nn.Module) -> None:
    def draw(prompt: str = "a cat", **options: object) -> np.ndarray:
        return arrays(txt2img(model, [prompt], **QUICK, **options))

    base = draw()
    for other in (draw("a dog"), draw(negative_prompt="blur"), draw(seed=43), draw(scale=1.0)):
        assert np.abs(base - other).max() > 1


def test_sizes(model: nn.Module) -> None:
    assert Geometry.of(model) == Geometry(height=32, width=32, channels=4, factor=4, multiple=8)
    assert txt2img(model, ["a"], height=48, width=24, **QUICK)[0].image.size == (24, 48)
    for given, nearest in ((50, 48), (53, 56), (3, 8)):
        with pytest.raises(UserError, match=f"{given}: must be a multiple of 8; the nearest is {nearest}"):
            txt2img(model, ["a"], height=given, **QUICK)


def test_stable_diffusions_sizes_come_from_its_yaml() -> None:
    model = loading.build_model(load_yaml(ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"))
    assert all(p.is_meta for p in model.parameters())
    assert Geometry.of(model) == Geometry(height=512, width=512, channels=4, factor=8, multiple=8)


def test_full_strength_is_txt2img_and_less_keeps_more(model: nn.Module) -> None:
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    drawn = arrays(txt2img(model, ["a cat"], scale=5.0, **QUICK))
    np.testing.assert_array_equal(drawn, arrays(img2img(model, image, ["a cat"], strength=1.0, **QUICK)))

    other = Image.effect_noise((32, 32), 60).convert("RGB")
    options = {"steps": 20, "progress": False, "scale": 1.0}

    def influence(strength: float) -> float:
        made = [arrays(img2img(model, im, ["a"], strength=strength, **options)) for im in (image, other)]
        return float(np.abs(made[0] - made[1]).mean())

    assert influence(1.0) == 0.0
    assert influence(0.05) > influence(0.8) > 0.0


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_img2img_does_not_depend_on_the_batch(model: nn.Module, sampler: str) -> None:
    image = Image.effect_noise((40, 32), 60).convert("L")
    options = {**QUICK, "sampler": sampler, "strength": 0.7}
    together = arrays(img2img(model, image, ["a", "b"], seed=1, **options))
    alone = arrays(img2img(model, image, "b", seed=2, **options))
    np.testing.assert_array_equal(together[1], alone[0])


def test_loading_as_the_originals_scripts_do(files: tuple[Path, Path], model: nn.Module) -> None:
    loaded = load_model_from_config(load_yaml(files[0]), str(files[1]), verbose=True)
    assert torch.equal(loaded.model.diffusion_model.out[2].weight.cpu(), model.model.diffusion_model.out[2].weight)


def test_adapters_by_their_manifest_and_scale(files: tuple[Path, Path], model: nn.Module, tmp_path: Path) -> None:
    tuned = load_model(*files, "cpu")
    torch.manual_seed(0)
    adapters.inject(tuned.model.diffusion_model, ADAPTERS)
    tuned.model.diffusion_model.save_adapter_to_dir(tmp_path / "adapters")
    expected = arrays(txt2img(tuned, ["a"], **QUICK))
    base = arrays(txt2img(model, ["a"], **QUICK))
    assert np.abs(expected - base).max() > 1

    loaded = load_model(*files, "cpu", adapter_path=tmp_path / "adapters")
    picture = txt2img(loaded, ["a"], **QUICK)[0]
    np.testing.assert_array_equal(expected, arrays([picture]))
    assert "Adapter: " in picture.settings.parameters()
    without = load_model(*files, "cpu", adapter_path=tmp_path / "adapters", adapter_scale=0.0)
    np.testing.assert_array_equal(base, arrays(txt2img(without, ["a"], **QUICK)))


def test_adapters_of_the_yaml_are_new_or_the_checkpoints(files: tuple[Path, Path], tmp_path: Path) -> None:
    from ldm.checkpoint import save_checkpoint

    config = load_yaml(files[0])
    config.model.params.unet_config.target = "ldm.modules.diffusionmodules.openaimodel_inject.UNetModel_inject"
    config.model.params.unet_config.params.adapter_config = ADAPTERS
    model = load_model(config, files[1], "cpu")
    assert adapters.find(model.model.diffusion_model)
    save_checkpoint(model.state_dict(), tmp_path / "with.safetensors")
    again = load_model(config, tmp_path / "with.safetensors", "cpu")
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
