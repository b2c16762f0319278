"""scripts/convert.py as people use it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm import cli
from ldm.checkpoint import read_state_dict
from ldm.exchange.folder import verify_sums
from ldm.loading import build_model
from tests.cli.sampling_model import main_of, write_model
from tests.programs import run

SCRIPT = "scripts/convert.py"


def convert(*words: object) -> None:
    main_of(SCRIPT)([str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its yaml beside."""
    return write_model(tmp_path_factory.mktemp("model"))[1]


@pytest.fixture(scope="module")
def training(model: Path) -> Path:
    """The same in the middle of a training: an optimiser, averaged weights that differ, a loss, Lightning's objects."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    state = read_state_dict(model)
    average = {f"model_ema.{k[6:].replace('.', '')}": v + 1 for k, v in state.items() if k.startswith("model.")}
    average |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    content = {
        "state_dict": {**state, **average, "first_stage_model.loss.logvar": torch.zeros(())},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(9)}}}],
        "callbacks": {ModelCheckpoint: {"best_model_path": Path("last.ckpt")}},
    }
    path = model.with_name("last.ckpt")
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "flags, ema, shift", [([], False, 1.0), (["--no_ema"], False, 0.0), (["--keep_ema"], True, 0.0)]
)
def test_the_sets_of_weights_of_a_training(
    flags: list[str], ema: bool, shift: float, model: Path, training: Path, tmp_path: Path
) -> None:
    convert(training, tmp_path / "out.safetensors", *flags)
    before, after = read_state_dict(model), read_state_dict(tmp_path / "out.safetensors")
    assert ("model_ema.num_updates" in after) == ema
    assert {key for key in after if not key.startswith("model_ema.")} == before.keys()
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(after[key], before[key] + shift)
    assert torch.equal(after["first_stage_model.quant_conv.bias"], before["first_stage_model.quant_conv.bias"])


def test_there_and_back_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "back.ckpt"
    convert(model, pipe)
    assert "the hashes kept with it agree" in capsys.readouterr().out
    assert verify_sums(pipe)
    convert(pipe, file)
    said = capsys.readouterr().out
    assert "back.yaml: the model's yaml" in said and "MiB" in said
    before, after = read_state_dict(model), read_state_dict(file)
    assert set(before) - set(after) and all(key.startswith(("betas", "alphas", "sqrt", "log", "post")) for key in
                                            set(before) - set(after))  # fmt: skip
    assert all(torch.equal(before[key], value) for key, value in after.items())
    yaml = OmegaConf.load(file.with_suffix(".yaml"))
    given = OmegaConf.load(model.with_suffix(".yaml"))
    assert yaml.model.params.scale_factor == given.model.params.scale_factor == 0.5
    shapes = [{k: v.shape for k, v in build_model(config).state_dict().items()} for config in (yaml, given)]
    assert shapes[0] == shapes[1]


def test_half_and_full_precision(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "half.ckpt", "--half")
    convert(tmp_path / "half.ckpt", tmp_path / "full.safetensors", "--full")
    before, half, full = (read_state_dict(p) for p in (model, tmp_path / "half.ckpt", tmp_path / "full.safetensors"))
    key = "model.diffusion_model.out.2.weight"
    assert half[key].dtype == torch.float16 and half["betas"].dtype == torch.float32
    assert torch.equal(full[key], before[key].half().float())


BAD = {
    "nothing there": (["{}/none.ckpt", "{}/out/a.ckpt"], "there is no file"),
    "a format that is not written": (["{}/model.ckpt", "{}/out/a.bin"], "must end in .safetensors or .ckpt"),
    "onto itself": (["{}/model.ckpt", "{}/model.ckpt"], "both the source and the target"),
    "both sets in a folder": (["{}/model.ckpt", "{}/out/pipe", "--keep_ema"], "--keep_ema is for files"),
    "another yaml": (["{}/model.ckpt", "{}/out/pipe", "--config", "{}/wide.yaml"], "misshapen: model.diffusion_model"),
    "no yaml": (["{}/alone.ckpt", "{}/out/pipe"], "with --config"),
    "yaml missing": (["{}/model.ckpt", "{}/out/pipe", "--config", "{}/none.yaml"], "none.yaml"),
    "a folder with other things": (["{}/model.ckpt", "{}"], "is there already and is no pipeline"),
    "lacks weights": (["{}/part.ckpt", "{}/out/pipe", "--config", "{}/model.yaml"], "missing: cond_stage_model"),
    "two precisions": (["{}/model.ckpt", "{}/out/a.ckpt", "--half", "--full"], "not allowed with"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = BAD[name]
    folder = model.parent
    text = model.with_suffix(".yaml").read_text(encoding="utf-8")
    (folder / "wide.yaml").write_text(text.replace("model_channels: 32", "model_channels: 64"), encoding="utf-8")
    (folder / "alone.ckpt").write_bytes(model.read_bytes())
    state = {k: v for k, v in read_state_dict(model).items() if not k.startswith("cond_stage_model.")}
    torch.save({"state_dict": state}, folder / "part.ckpt")
    with pytest.raises(SystemExit) as stop:
        cli.run(main_of(SCRIPT), [word.replace("{}", str(folder)) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not (folder / "out" / "pipe").exists() and not list(folder.glob("out/*"))


def test_as_a_program() -> None:
    done = run(SCRIPT, "no.ckpt", "folder")
    assert done.returncode == 2
    assert done.stderr == "error: checkpoint: there is no file 'no.ckpt'\n"
