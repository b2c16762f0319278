"""Compiled blocks compute what they computed, with and without adapters; inductor's code is not looked at here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.compilation import compile_blocks
from ldm.errors import UserError
from ldm.inference import load_model, txt2img
from ldm.modules import adapters, fast_layers
from tests.cli.sampling_model import write_model
from tests.networks import relative_error, run, spatial_unet

CONFIG = {"transformer_adp_config": {"din": "attn2o", "dout": "ffni", "mid_dim": 8, "init": "default"},
          "resblock_adp_config": {"din": "resi", "dout": "reso", "mid_dim": 8, "init": "default"}}  # fmt: skip


def test_blocks_are_compiled_whole_and_follow_their_adapters() -> None:
    unet = spatial_unet()
    keys, base = list(unet.state_dict()), run(unet)
    compile_blocks(unet, backend="eager", fullgraph=True)
    assert list(unet.state_dict()) == keys
    assert torch.equal(run(unet), base)
    torch.manual_seed(0)
    adapters.inject(unet, CONFIG)
    adapted = run(unet)
    plain = spatial_unet()
    adapters.inject(plain, CONFIG)
    plain.load_state_dict(unet.state_dict())
    assert torch.equal(adapted, run(plain)) and relative_error(adapted, base) > 1e-3
    unet.adapters_enable(False)
    assert torch.equal(run(unet), base)


def test_pictures_are_the_same(tmp_path: Path) -> None:
    files = write_model(tmp_path)
    pictures = []
    for compiled in (False, True):
        model = load_model(*files, "cpu")
        if compiled:
            compile_blocks(model.model.diffusion_model, backend="eager")
        pictures.append(txt2img(model, "a cat", steps=3, sampler="plms", progress=False)[0].image)
    np.testing.assert_array_equal(*map(np.asarray, pictures))


def test_drawing_again_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fast_layers, "CHANNELS", 8)  # as in a large network, every 3x3 convolution could be sped up
    model = load_model(*write_model(tmp_path), "cpu")
    compiled: list[object] = []
    compile_blocks(model.model.diffusion_model, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    counts = []
    for _ in range(3):
        txt2img(model, "a cat", steps=2, sampler="ddim", progress=False)
        counts.append(len(compiled))
    assert counts[0] > 0 and counts == counts[:1] * 3


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--compile: Sequential has no blocks"):
        compile_blocks(nn.Sequential())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="--compile: torch needs a C\\+\\+ compiler"):
        compile_blocks(spatial_unet())
