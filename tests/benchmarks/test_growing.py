"""The benchmark of growing trains both networks, of which the grown one starts ahead."""

import importlib.util
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.util import instantiate_from_config, load_yaml

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("growing", ROOT / "benchmarks" / "growing.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
NARROW = "model.params.unet_config.params.{}={}"


def small_yaml(name: str, channels: list[int], size: int) -> object:
    words = [NARROW.format("channels", channels), NARROW.format("feats_in", 16), f"model.params.image_size={size}",
             NARROW.format("depths", [1] * len(channels)), f"data.params.train.params.size={size}",
             "model.base_learning_rate=1.0"]  # fmt: skip
    return load_yaml(ROOT / "configs" / "karras" / f"{name}.yaml", overrides=words)


def test_both_are_trained_and_measured(tmp_path, capsys):
    torch.manual_seed(0)
    small = instantiate_from_config(small_yaml("photos-32", [8, 16], 8).model)
    torch.save({"state_dict": small.state_dict()}, tmp_path / "small.ckpt")
    OmegaConf.save(small_yaml("photos-64", [8, 8, 16], 16), tmp_path / "large.yaml")
    words = ["--config", str(tmp_path / "large.yaml"), "--points", "0,2", "--samples", "8", "--seeds", "0,1"]
    benchmark.main(["--grow_from", str(tmp_path / "small.ckpt"), *words])
    rows = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:3] in ("| 0", "| 2")
    ]
    start, end = ([[float(word) for word in cell.split(" ± ")] for cell in row[1:]] for row in rows)
    assert start[0] == start[1] and start[0][1] > 0  # neither network knows anything; the seeds differ
    assert end[0] != end[1]


def test_what_is_not_there_is_said(tmp_path):
    for words, said in (
        ([], "there is no file 'none.ckpt'"),
        (["--points", "0,a"], "--points 0,a: expected numbers"),
        (["--seeds", "-1"], "--seeds -1: expected numbers"),
        (["--samples", "0"], "--samples 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            benchmark.main(["--grow_from", "none.ckpt", *words])
