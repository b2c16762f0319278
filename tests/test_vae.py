"""Another autoencoder for a loaded model, from every kind of file that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.exchange import vae as table
from ldm.loading import load_model
from ldm.vae import load_vae
from ldm.weight_files import StateDict, write_tensors
from tests.cli.sampling_model import write_model

DDCONFIG = {"ch_mult": [1, 1, 1], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_model(*write_model(tmp_path_factory.mktemp("model")), "cpu")


@pytest.fixture(scope="module")
def weights(model: nn.Module) -> StateDict:
    """Random weights for its autoencoder."""
    generator = torch.Generator().manual_seed(1)
    own = model.first_stage_model.state_dict()
    return {key: torch.randn(value.shape, generator=generator) for key, value in own.items()}


def in_diffusers_names(weights: StateDict) -> StateDict:
    names = table.names(DDCONFIG)
    return {names.theirs(k): table.weight_to_diffusers(names.theirs(k), v) for k, v in weights.items()}


def folder(place: Path, weights: StateDict, scale: float, name: str = "diffusion_pytorch_model.safetensors") -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"scaling_factor": scale}), encoding="utf-8")
    write_tensors(in_diffusers_names(weights), place / name, "bin" if name.endswith("bin") else "safetensors")
    return place


def whole(state: StateDict) -> StateDict:
    return {f"first_stage_model.{k}": v for k, v in state.items()} | {"model.diffusion_model.x": torch.zeros(1)}


WAYS: dict[str, Callable[[Path, StateDict], Path]] = {
    "alone": lambda place, state: place / "vae.ckpt",
    "part of a model": lambda place, state: place / "whole.safetensors",
    "under diffusers' names": lambda place, state: place / "theirs.safetensors",
    "a folder": lambda place, state: folder(place / "vae-folder", state, 0.5),
    "a pipeline's folder": lambda place, state: folder(place / "pipe" / "vae", state, 0.5).parent,
    "a folder in fp16": lambda place, state: folder(
        place / "vae-half", {k: v.half() for k, v in state.items()}, 0.5, "diffusion_pytorch_model.fp16.safetensors"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_its_weights_are_taken(way: str, model: nn.Module, weights: StateDict, tmp_path: Path) -> None:
    write_tensors(weights | {"loss.logvar": torch.zeros(())}, tmp_path / "vae.ckpt", "ckpt")
    write_tensors(whole(weights), tmp_path / "whole.safetensors", "safetensors")
    write_tensors(in_diffusers_names(weights), tmp_path / "theirs.safetensors", "safetensors")
    path = WAYS[way](tmp_path, weights)
    before = model.model.state_dict()
    load_vae(model, path)
    after = model.first_stage_model.state_dict()
    for key, value in weights.items():
        assert torch.equal(after[key], value.half().float() if "fp16" in way else value), key
    assert all(value is not None and torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    assert model.origin["vae"] == path.name.partition(".")[0]
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())


def test_by_the_hubs_name(
    model: nn.Module, weights: StateDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--someone--decoder"
    folder(kept / "snapshots" / "0123abcd", weights, 0.5)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123abcd")
    load_vae(model, "someone/decoder")
    assert torch.equal(model.first_stage_model.decoder.conv_out.bias, weights["decoder.conv_out.bias"])
    assert model.origin["vae"] == "decoder"


def test_another_models_is_refused_in_a_line(model: nn.Module, weights: StateDict, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("no weights")
    folder(tmp_path / "xl", weights, 0.13025)
    write_tensors(weights | {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "wide.ckpt", "ckpt")
    encoder = {k: v for k, v in weights.items() if not k.startswith("decoder")}
    write_tensors(encoder, tmp_path / "half.ckpt", "ckpt")
    cases = {
        "empty": "has no diffusion_pytorch_model.safetensors",
        "text.ckpt": "neither a .ckpt nor a .safetensors",
        "xl": "latents are scaled by 0.13025, this model's by 0.5",
        "wide.ckpt": r"misshapen: decoder.conv_in .* is \[8, 4, 3, 3\]",
        "half.ckpt": "lacks weights of this autoencoder: missing: decoder",
        "none.ckpt": "there is no file",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_vae(model, tmp_path / name)
        said = str(caught.value)
        assert "\n" not in said and said.startswith("--vae: ") and name in said
