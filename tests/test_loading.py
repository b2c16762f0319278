"""Models from files: which weights are taken, what is said of those that do not fit, what is never done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import read_state_dict
from ldm.errors import UserError
from ldm.loading import load_model
from ldm.util import load_yaml
from ldm.weight_files import write_tensors
from tests.cli.sampling_model import write_model

OUT = "model.diffusion_model.out.2.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of plain weights, and one with averaged weights beside them."""
    folder = tmp_path_factory.mktemp("model")
    state = read_state_dict(write_model(folder)[1])
    average = {f"model_ema.{k[6:].replace('.', '')}": v + 1 for k, v in state.items() if k.startswith("model.")}
    write_tensors(
        state | average | {"model_ema.num_updates": torch.tensor(7)}, folder / "both.safetensors", "safetensors"
    )
    return folder


def config(files: Path, use_ema: bool | None) -> DictConfig:
    yaml = load_yaml(files / "model.yaml")
    del yaml.model.params.use_ema
    return yaml if use_ema is None else OmegaConf.merge(yaml, {"model": {"params": {"use_ema": use_ema}}})


@pytest.mark.parametrize("use_ema, shift", [(True, 1.0), (None, 1.0), (False, 0.0)])
def test_use_ema_chooses_the_set_of_weights(
    use_ema: bool | None, shift: float, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(config(files, use_ema), files / "both.safetensors", "cpu")
    plain = read_state_dict(files / "model.ckpt")
    assert torch.equal(model.state_dict()[OUT], plain[OUT] + shift)
    assert ("use_ema is false" in capsys.readouterr().out) == (shift == 0.0)
    model = load_model(config(files, use_ema), files / "model.ckpt", "cpu")
    assert torch.equal(model.state_dict()[OUT], plain[OUT])
    assert ("no averaged (EMA) weights" in capsys.readouterr().out) == (shift == 1.0)


def test_nothing_is_drawn_at_random_and_weights_stay_in_the_file(files: Path) -> None:
    write_tensors(read_state_dict(files / "model.ckpt"), files / "plain.safetensors", "safetensors")
    before = torch.random.get_rng_state()
    model = load_model(files / "model.yaml", files / "plain.safetensors", "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "plain.safetensors" in line]
    ranges = [[int(end, 16) for end in words[0].split("-")] for words in maps]
    places = [p.data_ptr() for p in model.parameters()]
    assert all(any(first <= place < last for first, last in ranges) for place in places)


def test_what_does_not_fit_is_summed_up_by_module(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = read_state_dict(files / "model.ckpt")
    more = {f"control_model.blocks.{i}.weight": torch.ones(1) for i in range(3)}
    write_tensors(state | more, files / "more.ckpt", "ckpt")
    load_model(files / "model.yaml", files / "more.ckpt", "cpu")
    assert "\n  unexpected: control_model.blocks (3 keys, e.g. 0.weight)\n" in capsys.readouterr().out

    decoder = [k for k in state if k.startswith("first_stage_model.decoder.")]
    write_tensors({k: v for k, v in state.items() if k not in decoder}, files / "less.ckpt", "ckpt")
    message = rf"lacks weights of this model: missing: first_stage_model.decoder \({len(decoder)} keys, e.g. "
    with pytest.raises(UserError, match=message):
        load_model(files / "model.yaml", files / "less.ckpt", "cpu")

    wide = OmegaConf.merge(
        config(files, False), {"model": {"params": {"unet_config": {"params": {"context_dim": 16}}}}}
    )
    message = (
        r"misshapen: model.diffusion_model.input_blocks \(.* is \[64, 32\] in the file and \[64, 16\] in the model"
    )
    with pytest.raises(UserError, match=message):
        load_model(wide, files / "model.ckpt", "cpu")


def test_without_a_yaml_the_one_beside_is_taken(files: Path) -> None:
    model = load_model(None, files / "model.ckpt", "cpu")
    assert model.scale_factor == 0.5 and model.origin["model"] == "model"


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((4,), float("nan")), r"no finite numbers \(1 in first_stage_model.quant_conv\)"),
        (torch.ones(4).to(torch.float8_e4m3fn), "float8_e4m3fn weights"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(value: torch.Tensor, message: str, files: Path) -> None:
    state = read_state_dict(files / "model.ckpt")
    key = "first_stage_model.quant_conv.bias"
    state[key] = value.repeat(len(state[key]) // len(value))
    write_tensors(state | {"model_ema.diffusion_modelnone": torch.full((2,), torch.inf)}, files / "bad.ckpt", "ckpt")
    with pytest.raises(UserError, match=message):  # and not of what is not used
        load_model(files / "model.yaml", files / "bad.ckpt", "cpu")
