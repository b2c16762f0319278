"""The yaml files of pruned students: the authors' values, twins, and models that are built without a teacher."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm import loading
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.networks import ROOT

CONFIGS = ROOT / "configs" / "distill"
V1 = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params
TINY = OmegaConf.load(ROOT / "models/tiny/config.yaml").model.params
PARAMETERS = {"sd-tiny": 323_384_964, "tiny-small": 4_283_012, "tiny-tiny": 3_262_724}


def config_of(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize("name", ["sd-small", "sd-tiny"])
def test_stable_diffusions_students_have_the_seeds_values(name: str) -> None:
    config = config_of(name)
    params, trainer, data = config["model"]["params"], config["lightning"]["trainer"], config["data"]["params"]
    assert (params["output_weight"], params["feature_weight"]) == (1, 1)
    assert (config["model"]["base_learning_rate"], trainer["max_steps"], trainer["gradient_clip_val"]) == (
        1e-5,
        15000,
        1,
    )
    assert (data["batch_size"], trainer["accumulate_grad_batches"], data["train"]["params"]["size"]) == (1, 4, 512)
    for part in ("cond_stage_config", "linear_start", "linear_end", "scale_factor"):
        assert params[part] == V1[part]
    assert params["first_stage_config"]["params"]["ddconfig"] == V1.first_stage_config.params.ddconfig
    instantiate_from_config(OmegaConf.create(config["data"]))  # knows its parameters, and reads nothing yet


@pytest.mark.parametrize("name", ["tiny-small", "tiny-tiny"])
def test_twins_differ_in_their_weights_alone(name: str) -> None:
    taught, untaught = config_of(name), config_of(f"{name}-untaught")
    for key in ("output_weight", "feature_weight"):
        assert (taught["model"]["params"].pop(key), untaught["model"]["params"].pop(key)) == (1, 0)
    assert taught == untaught
    for part in ("first_stage_config", "cond_stage_config", "linear_end", "parameterization"):
        assert taught["model"]["params"][part] == TINY[part]


@pytest.mark.parametrize("name", ["sd-tiny", "tiny-small", "tiny-tiny"])
def test_to_sample_a_student_needs_no_teacher(name: str) -> None:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    config.model.params.teacher_config.ckpt_path = "gone.ckpt"
    model = loading.build_model(config)
    assert isinstance(model, LatentDiffusion)
    assert sum(p.numel() for p in model.model.parameters()) == PARAMETERS[name]
