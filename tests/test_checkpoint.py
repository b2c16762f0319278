"""Checkpoints: every form is read, nothing is run, files appear whole, keys are summed up."""

from __future__ import annotations

import collections
import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm import checkpoint, weight_files
from ldm.errors import UserError


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{layer}.{kind}": torch.randn(4, 4, generator=generator) for layer in "ab" for kind in ("x", "y")}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("half", [False, True])
def test_round_trip(suffix: str, half: bool, tmp_path: Path) -> None:
    state = {**weights(), "betas": torch.rand(8), "scale_factor": torch.tensor(0.18215)}
    checkpoint.save_checkpoint(state, tmp_path / f"model{suffix}", half=half)
    read = checkpoint.read_state_dict(tmp_path / f"model{suffix}")
    assert read.keys() == state.keys()
    for key, value in state.items():
        expected = value.half() if half and "." in key else value
        assert torch.equal(read[key], expected), key
    assert {p.name for p in tmp_path.iterdir()} == {f"model{suffix}", f"model{suffix}.sha256"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save_checkpoint(weights(), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot be written"):  # safetensors takes no sparse tensors
        checkpoint.save_checkpoint({"a": torch.zeros(2).to_sparse()}, path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "model.safetensors.sha256"}
    assert weight_files.verify_hash(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_full_disk_is_told_in_a_line(name: str, tmp_path: Path) -> None:
    checkpoint.save_checkpoint(weights(), tmp_path / name)
    before = (tmp_path / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # files of this process may have a MiB
    try:
        with pytest.raises(UserError, match=f"{name}' cannot be written: "):
            checkpoint.save_checkpoint({"big": torch.ones(2**20)}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / name).read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.sha256"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("level", [True, False])
def test_lightning_objects_beside_the_weights_are_not_imported(zipped: bool, level: bool, tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import ModelCheckpoint

    callbacks = {ModelCheckpoint: {"best": np.float64(0.5), "counts": collections.defaultdict(int)}}
    beside = {"callbacks": callbacks, "hyper_parameters": OmegaConf.create({"a": [1, 2]}), "epoch": 3}
    content = {"state_dict": weights(), **beside} if level else {**weights(), **beside}
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=zipped)
    read = checkpoint.read_state_dict(tmp_path / "old.ckpt")
    assert read.keys() == weights().keys()
    assert all(torch.equal(read[k], v) for k, v in weights().items())


class TwoLevels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"one": nn.Linear(2, 3), "two": nn.Linear(3, 2)})
        self.b = nn.Linear(2, 2)


def test_keys_are_summed_up_by_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TwoLevels()
    state = {k: v + 1 for k, v in model.state_dict().items() if not k.startswith("a.two")}
    state["c.deep.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "part.ckpt")
    report = checkpoint.load_into(model, tmp_path / "part.ckpt")
    assert torch.equal(model.b.weight, state["b.weight"])
    assert report.lines() == [
        "missing: a.two (2 keys, e.g. weight)",
        "unexpected: c.deep (1 key, e.g. weight)",
    ]
    printed = capsys.readouterr().out
    assert all(line in printed for line in report.lines())

    state["b.weight"] = torch.zeros(3, 2)
    torch.save(state, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match=r"misshapen: b \(1 key, e.g. weight is \[3, 2\] in the file and \[2, 2\]"):
        checkpoint.load_into(model, tmp_path / "part.ckpt")
    checkpoint.load_into(model, tmp_path / "part.ckpt", ignore_keys=["b."])


def test_a_part_is_found_in_a_whole_models_checkpoint(tmp_path: Path) -> None:
    part = TwoLevels()
    state = {f"first_stage_model.{k}": v + 1 for k, v in part.state_dict().items()}
    torch.save({"state_dict": {**state, "model.diffusion_model.x": torch.zeros(1)}}, tmp_path / "whole.ckpt")
    report = checkpoint.load_into(part, tmp_path / "whole.ckpt")
    assert torch.equal(part.b.bias, state["first_stage_model.b.bias"])
    assert report.lines() == []


def test_averaged_weights_take_the_place_of_plain_ones() -> None:
    state = {
        "model.diffusion_model.out.0.weight": torch.zeros(2),
        "model.diffusion_model.frozen": torch.ones(2),
        "model_ema.diffusion_modelout0weight": torch.full((2,), 5.0),
        "model_ema.decay": torch.tensor(0.9),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "first_stage_model.conv.weight": torch.zeros(1),
    }
    folded = checkpoint.for_inference(state)
    assert set(folded) == {
        "model.diffusion_model.out.0.weight", "model.diffusion_model.frozen", "first_stage_model.conv.weight",
    }  # fmt: skip
    assert folded["model.diffusion_model.out.0.weight"].tolist() == [5.0, 5.0]
    plain = checkpoint.for_inference(state, ema=False)
    assert plain["model.diffusion_model.out.0.weight"].tolist() == [0.0, 0.0]


def test_a_hash_is_kept_and_tells_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    checkpoint.save_checkpoint(weights(), path)
    digest, name = (tmp_path / "model.ckpt.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(path.read_bytes()).hexdigest(), "model.ckpt")
    assert weight_files.verify_hash(path)
    checkpoint.save_checkpoint({"a": torch.ones(3)}, path)
    assert weight_files.verify_hash(path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="is not the file that 'model.ckpt.sha256' was made for"):
        weight_files.verify_hash(path)
    path.with_name("model.ckpt.sha256").unlink()
    assert not weight_files.verify_hash(path)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "again": whole, "part": whole[1], "turned": whole.T}
    for name in ("model.ckpt", "model.safetensors"):
        checkpoint.save_checkpoint({k: state[k] for k in ("whole", "again", "turned")}, tmp_path / name)
        read = checkpoint.read_state_dict(tmp_path / name)
        assert all(torch.equal(read[key], state[key]) for key in read)
    checkpoint.save_checkpoint({"part": state["part"]}, tmp_path / "part.ckpt")
    assert checkpoint.read_state_dict(tmp_path / "part.ckpt")["part"].untyped_storage().nbytes() == 16


def test_text_encoders_of_other_tools_get_the_level_that_they_leave_out(tmp_path: Path) -> None:
    inner = "cond_stage_model.transformer."
    keys = ("encoder.layers.0.mlp.fc1.bias", "text_model.final_layer_norm.bias", "token_emb.weight")
    torch.save({inner + key: torch.ones(2) for key in keys}, tmp_path / "model.ckpt")
    assert set(checkpoint.read_state_dict(tmp_path / "model.ckpt")) == {
        f"{inner}text_model.encoder.layers.0.mlp.fc1.bias", inner + keys[1], inner + keys[2],
    }  # fmt: skip


def test_empty_weights_take_no_memory_and_buffers_are_real() -> None:
    with checkpoint.empty_weights():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to("cpu")
    assert all(p.is_meta for p in model.parameters())
    assert model[1].running_var.tolist() == [1.0] * 4
    assert not nn.Linear(2, 2).weight.is_meta


def test_loaded_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    state = {"weight": torch.randn(512, 512), "bias": torch.randn(512)}
    for name in ("model.ckpt", "model.safetensors"):
        checkpoint.save_checkpoint(state, tmp_path / name)
        read = checkpoint.read_state_dict(tmp_path / name)
        with checkpoint.empty_weights():
            model = nn.Linear(512, 512)
        checkpoint.apply_state_dict(model, read, name, assign=True)
        assert model.weight.data_ptr() == read["weight"].data_ptr()
        assert torch.equal(model.weight, state["weight"])


def memory(line: str) -> int:
    """VmRSS or VmHWM (its highest value so far) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{line}:")[1].split()[0])


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "blob-without-ending"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loading_takes_little_more_memory_than_the_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layers, size = 24, 1280  # 150 MiB in float32
    state = {f"{i}.weight": torch.full((size, size), float(i), dtype=dtype) for i in range(layers)}
    weight_files.write_tensors(state, tmp_path / name, "ckpt" if name.endswith("ckpt") else "safetensors")
    del state
    with checkpoint.empty_weights():
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts anew
    before = memory("VmRSS")
    checkpoint.apply_state_dict(model, checkpoint.read_state_dict(tmp_path / name), name, assign=True)
    assert sum(float(layer.weight.detach().sum()) for layer in model) == size**2 * sum(range(layers))
    weights = 4 * size**2 * layers
    assert memory("VmHWM") - before < 1.2 * weights
