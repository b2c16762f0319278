"""The yaml of a checkpoint that nobody names one for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.identify import config_of
from ldm.util import load_yaml
from tests.networks import ROOT

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONFIGS = ROOT / "configs" / "stable-diffusion"


def weights(channels: int, text: int, width: int = 320) -> dict[str, torch.Tensor]:
    return {FIRST: torch.zeros(width, channels, 3, 3), TEXT: torch.zeros(width, text)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"state_dict": weights(4, 768)}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_stable_diffusion_is_told_by_its_shapes(file: Path) -> None:
    assert config_of(file) == load_yaml(CONFIGS / "v1-inference.yaml")
    for text, name in ((768, "v1-inpainting-inference.yaml"), (1024, "v2-inpainting-inference.yaml")):
        assert config_of(file, state=weights(9, text)) == load_yaml(CONFIGS / name)
    with pytest.raises(UserError, match=r"v2-inference\.yaml .*512.*v2-inference-v\.yaml .*768") as caught:
        config_of(file, state=weights(4, 1024))
    for word in str(caught.value).split():
        assert not word.startswith("configs/") or (ROOT / word).is_file()


@pytest.mark.parametrize(
    "state", [weights(4, 768, 64), weights(5, 768), {FIRST: torch.zeros(320)}, {"a": torch.ones(1)}]
)
def test_others_need_a_yaml(state: dict[str, torch.Tensor], file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--config"):
        config_of(file, state=state)
    (tmp_path / "default.yaml").write_text("model: {is: the default}", encoding="utf-8")
    assert config_of(file, tmp_path / "default.yaml", state=state) == {"model": {"is": "the default"}}


def test_the_yaml_beside_a_file_is_its_own(file: Path) -> None:
    file.with_suffix(".yaml").write_text("model: {is: mine}", encoding="utf-8")
    assert config_of(file) == {"model": {"is": "mine"}}
