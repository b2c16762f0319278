import json
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm import loading
from ldm.modules import adapters
from ldm.modules.noise import GaussianNoise, ImmiscibleNoise
from ldm.modules.randomness import SampleRandom
from ldm.util import instantiate_from_config
from scripts.render_configs import ADAPTERS, CONFIGS, EXPERIMENTS, PAIRINGS, stale_files
from tests.networks import GOLDENS, ROOT
from tests.zoo import build, small_config

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


# ---- immiscible diffusion ----------------------------------------------------------------------------------

# The experiments of the paper: learning rate, batch, steps.
PUBLISHED = {"scratch": (1e-4, 2048, 20_000), "finetune": (1e-5, 512, 5_000)}


def immiscible(experiment: str, pairing: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "immiscible" / f"{experiment}-{pairing}.yaml"))


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "tiny"])
def test_immiscible_twins_differ_in_their_noise_alone(experiment):
    twins = {pairing: immiscible(experiment, pairing) for pairing in PAIRINGS}
    noise = {pairing: twin["model"]["params"].pop("noise_config", None) for pairing, twin in twins.items()}
    assert twins["vanilla"] == twins["assignment"] == twins["knn"]
    assert noise["vanilla"] is None and noise["knn"]["params"] == {"method": "knn", "k": 64}
    assert noise["assignment"]["params"] == {"method": "assignment"}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_immiscible_experiments_have_the_papers_values(experiment):
    config = immiscible(experiment, "assignment")
    trainer, data = config["lightning"]["trainer"], config["data"]["params"]
    batch = trainer["devices"] * data["batch_size"] * trainer["accumulate_grad_batches"]
    assert (config["model"]["base_learning_rate"], batch, trainer["max_steps"]) == PUBLISHED[experiment]
    v1 = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params
    for part in ("unet_config", "cond_stage_config"):
        assert config["model"]["params"][part] == v1[part]
    assert bool(config["model"]["params"]["ignore_keys"]) == (experiment == "scratch")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_immiscible_models_can_be_built(experiment):
    model = loading.build_model(OmegaConf.load(CONFIGS / "immiscible" / f"{experiment}-assignment.yaml"))
    assert sum(p.numel() for p in model.model.parameters()) == 859_520_964
    assert not any(p.requires_grad for p in model.cond_stage_model.parameters())


@pytest.mark.parametrize(
    ("experiment", "pairing"), [("scratch", "assignment"), ("finetune", "knn"), ("tiny", "vanilla")]
)
def test_immiscible_models_made_small_learn(experiment, pairing):
    path = CONFIGS / "immiscible" / f"{experiment}-{pairing}.yaml"
    model = build(small_config(path))
    assert type(model.draw) is (GaussianNoise if pairing == "vanilla" else ImmiscibleNoise)
    instantiate_from_config(OmegaConf.load(path).data)  # knows its parameters, and reads nothing yet
    side = 8 * 2 ** (len(model.first_stage_model.encoder.down) - 1)
    images = torch.rand(3, side, side, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"image": images, "caption": ["tench", "goldfish", "great white shark"]}
    loss, _ = model.shared_step(batch, SampleRandom(1, 0, 0, 3, "cpu"))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.model.parameters())


def test_the_tiny_twin_takes_its_encoders_and_starts_its_network_anew():
    model = instantiate_from_config(OmegaConf.load(CONFIGS / "immiscible" / "tiny-vanilla.yaml").model)
    shipped = loading.load_model(ROOT / "models/tiny/config.yaml", ROOT / "models/tiny/model.safetensors", "cpu")
    for part in ("first_stage_model", "cond_stage_model"):
        for own, theirs in zip(getattr(model, part).parameters(), getattr(shipped, part).parameters(), strict=True):
            assert torch.equal(own, theirs)
    assert model.scale_factor == shipped.scale_factor != 1
    weight = "input_blocks.1.0.in_layers.2.weight"
    own, theirs = (m.model.diffusion_model.get_parameter(weight) for m in (model, shipped))
    assert not torch.equal(own, theirs)
    assert torch.equal(dict(model.model_ema.named_buffers())[f"diffusion_model{weight.replace('.', '')}"], own)
