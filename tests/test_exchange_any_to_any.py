"""Every kind of file and folder is made into every other, with the same weights in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import read_state_dict
from ldm.exchange.convert import Conversion
from ldm.exchange.folder import write_folder
from ldm.loading import build_model
from ldm.util import load_yaml
from ldm.weight_files import COMPUTED, StateDict, in_precision, write_tensors
from tests.cli.sampling_model import YAML

WORDS = 64  # of the vocabulary: nothing is tokenized here
TARGETS = {"ckpt": ("out.ckpt", {}), "safetensors": ("out.safetensors", {}), "folder": ("out", {}),
           "folder of .bin": ("out", {"as_bin": True})}  # fmt: skip


def training(state: StateDict) -> dict[str, object]:
    """What a trainer leaves: the wanted weights are the averaged ones."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    plain = {k: v + 1 if k.startswith("model.") else v for k, v in state.items()}
    average = {f"model_ema.{k[6:].replace('.', '')}": v for k, v in state.items() if k.startswith("model.")}
    beside = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    losses = {"first_stage_model.loss.logvar": torch.zeros(())}
    return {
        "state_dict": plain | average | beside | losses,
        "callbacks": {ModelCheckpoint: {"best_model_path": Path("last.ckpt")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(9)}}}],
    }


def torch_file(content: Callable[[StateDict], object], **options: object) -> Callable[[StateDict, Path], Path]:
    def write(state: StateDict, place: Path) -> Path:
        torch.save(content(state), place / "model.ckpt", **options)
        return place / "model.ckpt"

    return write


def safetensors_file(state: StateDict, place: Path) -> Path:
    write_tensors(state, place / "model.safetensors", "safetensors")
    return place / "model.safetensors"


def pipeline_folder(**options: object) -> Callable[[StateDict, Path], Path]:
    def write(state: StateDict, place: Path) -> Path:
        write_folder(state, load_yaml(place / "model.yaml"), place / "pipeline", **options)
        return place / "pipeline"

    return write


def halved(state: StateDict) -> StateDict:
    return in_precision(state, torch.float16)


# name: how it is written, whether its weights are fp16
SOURCES: dict[str, tuple[Callable[[StateDict, Path], Path], bool]] = {
    "ckpt": (torch_file(lambda state: {"state_dict": state}), False),
    "ckpt without a level": (torch_file(lambda state: state), False),
    "ckpt of the old format": (torch_file(training, _use_new_zipfile_serialization=False), False),
    "ckpt of a training": (torch_file(training), False),
    "ckpt in fp16": (torch_file(lambda state: {"state_dict": halved(state), "global_step": 5}), True),
    "safetensors": (safetensors_file, False),
    "safetensors in fp16": (lambda state, place: safetensors_file(halved(state), place), True),
    "folder": (pipeline_folder(), False),
    "folder of .bin in fp16": (pipeline_folder(dtype=torch.float16, as_bin=True), True),
}


@pytest.fixture(scope="module")
def weights() -> StateDict:
    """Random weights of a small Stable Diffusion, noise schedule included."""
    from omegaconf import OmegaConf

    from ldm.util import instantiate_from_config

    torch.manual_seed(0)
    return instantiate_from_config(OmegaConf.create(yaml_text_config()).model).state_dict()


def yaml_text_config() -> str:
    return YAML.replace("architecture: {", f"architecture: {{vocab_size: {WORDS}, ")


@pytest.mark.parametrize("source", SOURCES)
def test_any_to_any(source: str, weights: StateDict, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml_text_config(), encoding="utf-8")
    write, half = SOURCES[source]
    path = write(weights, tmp_path)
    networks = {k: v for k, v in weights.items() if not k.startswith(COMPUTED)}
    expected = halved(networks) if half else networks
    for kind, (name, options) in TARGETS.items():
        place = tmp_path / kind
        assert not [
            line for line in Conversion(**options)(path, place / name) if ".yaml" not in line and "hash" not in line
        ]
        found = read_state_dict(place / name)
        assert {k for k in found if not k.startswith(COMPUTED)} == expected.keys(), kind
        assert all(torch.equal(found[key], value) for key, value in expected.items()), kind
        if kind == "ckpt" and path.is_dir():
            own = build_model(load_yaml((place / name).with_suffix(".yaml"))).state_dict()
            assert own.keys() == weights.keys()
