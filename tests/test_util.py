import os

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.util import (
    UserError,
    atomic_path,
    count_params,
    default,
    instantiate_from_config,
    load_yaml,
    pick_device,
)


def test_instantiate_builds_what_the_yaml_describes():
    config = OmegaConf.create({"target": "torch.nn.Linear", "params": {"in_features": 3}})
    layer = instantiate_from_config(config, out_features=5)
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (5, 3)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    assert instantiate_from_config("__is_first_stage__") is None


@pytest.mark.parametrize(
    "config, message",
    [
        ({"params": {}}, "target"),
        ({"target": "Linear"}, "dotted path"),
        ({"target": "torch.nn.Lineer"}, "has no 'Lineer'"),
        ({"target": "ldm.nowhere.Thing"}, "no module 'ldm.nowhere'"),
        ({"target": "torch.nn.Linear", "params": [1]}, "must be a mapping"),
        ({"target": "ldm.modules.ema.LitEma", "params": {"sise": 1}}, "sise"),
        ({"target": "ldm.data.shapes.ShapesDataset", "params": {"toys": "many"}}, "is .many.; it must be a number"),
        ({"target": "ldm.data.shapes.ShapesDataset", "params": {"variety": "some"}}, "it must be true or false"),
        ("hello", "expected a section"),
    ],
)
def test_wrong_sections_are_named(config, message):
    with pytest.raises(UserError, match=message):
        instantiate_from_config(config)


def test_yaml_files_merge_left_to_right_then_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {params: {x: 1, y: 1, z: 1}}")
    (tmp_path / "b.yaml").write_text("model: {params: {y: 2, z: 2}}")
    config = load_yaml(tmp_path / "a.yaml", tmp_path / "b.yaml", overrides=["model.params.z=3"])
    assert dict(config.model.params) == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize("text", ["model: {params: [", "- just\n- a list", "\x00\x01"])
def test_bad_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml") as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_small_helpers():
    assert default(None, 3) == 3 and default(0, 3) == 0 and default(None, lambda: 4) == 4
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert count_params(layer) == 6 and count_params(layer, trainable=True) == 4


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cpu:x"):
        with pytest.raises(UserError, match="--device"):
            pick_device(name)
