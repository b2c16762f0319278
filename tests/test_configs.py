import json

import pytest
from omegaconf import OmegaConf

from ldm.modules import adapters
from scripts.render_configs import ADAPTERS, CONFIGS, stale_files
from tests.networks import GOLDENS, ROOT

SEEDS = json.loads((GOLDENS / "adapters.json").read_text())["configs"]


def test_rendered_files_are_current():
    assert stale_files(CONFIGS) == []


def test_there_are_all_adapter_configs():
    assert set(ADAPTERS.members) == set(SEEDS)


@pytest.mark.parametrize("name", SEEDS)
def test_adapter_configs_have_the_papers_values(name):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / ADAPTERS.directory / f"{name}.yaml"))
    params, seed = config["model"]["params"], SEEDS[name]
    assert params["unet_config"]["params"].pop("adapter_config") == seed["adapter"]
    assert config["model"]["base_learning_rate"] == seed["lr"]
    assert params["reg_weight"] == seed["reg_weight"]
    assert params["train_level"] == seed["train_level"]
    assert config["data"]["params"]["train"]["params"]["repeats"] == seed["repeats"]
    assert config["lightning"]["trainer"]["max_steps"] == seed["max_steps"]
    assert adapters.parse_config(seed["adapter"])
    v1 = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params
    assert params["unet_config"]["params"] == v1.unet_config.params
    assert params["cond_stage_config"] == v1.cond_stage_config
