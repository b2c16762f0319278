"""k-diffusion's own JSON configs, as yaml of `KarrasDiffusion`, and the weights of its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError

Section = dict[str, Any]
DEFAULTS: dict[str, Section] = {
    "model": {
        "patch_size": 1, "augment_wrapper": True, "mapping_cond_dim": 0, "unet_cond_dim": 0, "cross_cond_dim": 0,
        "cross_attn_depths": None, "skip_stages": 0, "has_variance": False, "sigma_data": 1.0, "dropout_rate": 0.0,
        "augment_prob": 0.0, "loss_config": "karras", "loss_weighting": "karras", "loss_scales": 1,
        "noise_perturbation_factor": 0.0,
    },
    "dataset": {"type": "imagefolder", "location": "/path/to/dataset"},
    "optimizer": {"type": "adamw", "lr": 1e-4, "betas": [0.95, 0.999], "eps": 1e-6, "weight_decay": 1e-3},
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}  # fmt: skip
DATASETS = ("imagefolder", "huggingface", "cifar10", "mnist")
NEEDED = ("type", "input_channels", "input_size", "mapping_out", "depths", "channels", "self_attn_depths", "sigma_min",
          "sigma_max", "sigma_sample_density")  # fmt: skip


def read_json(path: str | Path) -> dict[str, Section]:
    """A JSON config with what it leaves out.

    Raises:
        UserError: there is no such file, or it is no config of an image_v1 model.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"config: there is no file '{path}'") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config: '{path}' is no JSON: {error}") from None
    return complete(content, str(path))


def complete(content: Any, source: str) -> dict[str, Section]:
    """A config's content with the defaults of what it leaves out; `source` is what errors call it.

    Raises:
        UserError: it is no config of an image_v1 model.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"config: '{source}' has no section \"model\"; it is no config of k-diffusion")
    kind = content["model"].get("type")
    if kind != "image_v1":
        raise UserError(f"config: '{source}': model type {kind!r} is not supported; image_v1 is")
    whole = {name: {**usual, **(content.get(name) or {})} for name, usual in DEFAULTS.items()}
    lacking = [key for key in NEEDED if key not in whole["model"]]
    if lacking:
        raise UserError(f"config: '{source}': model.{lacking[0]} is missing")
    return whole


def to_yaml(config: Mapping[str, Section], batch_size: int = 64) -> Section:
    """A whole yaml for main.py from a config of `read_json`: model, data, and how the learning rate is meant.

    Raises:
        UserError: something in the config is not supported.
    """
    model, optimizer = config["model"], dict(config["optimizer"])
    size = model["input_size"]
    size = [size, size] if isinstance(size, int) else size
    if len(size) != 2 or size[0] != size[1]:
        raise UserError(f"config: model.input_size is {size}; images are square")
    if model["loss_scales"] != 1:
        raise UserError(f"config: model.loss_scales is {model['loss_scales']}; only 1 is supported")
    if model["loss_config"] not in ("karras", "simple"):
        raise UserError(f"config: model.loss_config is {model['loss_config']!r}; it may be karras or simple")
    if config["ema_sched"]["type"] != "inverse":
        raise UserError(f"config: ema_sched.type is {config['ema_sched']['type']!r}; it may be inverse")
    weighting = "snr" if model["loss_config"] == "simple" else model["loss_weighting"]  # the same loss
    params: Section = {
        "image_size": size[0],
        "channels": model["input_channels"],
        **{key: model[key] for key in ("sigma_data", "sigma_min", "sigma_max")},
        "weighting": weighting,
        "stratified": True,
        "augment_prob": model["augment_prob"] if model["augment_wrapper"] else None,
        "ema_decay": config["ema_sched"].get("max_value", 1.0),
        "ema_config": {k: v for k, v in config["ema_sched"].items() if k != "type"},
        "sigma_density": density(model, size[0]),
        "scheduler_config": schedule(config["lr_sched"]),
        "unet_config": network(model),
    }
    rate = optimizer.pop("lr")
    params["optimizer_config"] = optimizer
    if model["noise_perturbation_factor"]:
        perturbed = {"input_perturbation": model["noise_perturbation_factor"]}
        params["noise_config"] = {"target": "ldm.modules.noise.GaussianNoise", "params": perturbed}
    return {
        "run": {"scale_lr": False},
        "model": {"base_learning_rate": rate, "target": "ldm.k_diffusion.training.KarrasDiffusion", "params": params},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": batch_size, "train": dataset(config["dataset"], size[0])},
        },
        "lightning": {"modelcheckpoint": {"params": {"every_n_train_steps": 10000, "save_top_k": 1}}},
    }


def network(model: Section) -> Section:
    """The section of the U-Net."""
    same = ("depths", "channels", "self_attn_depths", "cross_attn_depths", "mapping_cond_dim", "unet_cond_dim",
            "cross_cond_dim", "dropout_rate", "patch_size", "skip_stages", "has_variance")  # fmt: skip
    params = {"c_in": model["input_channels"], "feats_in": model["mapping_out"], **{key: model[key] for key in same}}
    return {"target": "ldm.k_diffusion.models.image_v1.ImageDenoiserModelV1", "params": params}


def density(model: Section, size: int) -> Section:
    """The section of the noise levels' density.

    Raises:
        UserError: there is no such density, or it lacks a number.
    """
    given, sigma_data = dict(model["sigma_sample_density"]), model["sigma_data"]
    kind = given.pop("type", None)
    bounds = {"min_value": model["sigma_min"], "max_value": model["sigma_max"]}
    renamed = {"mean": "loc", "std": "scale", "std_1": "scale_1", "std_2": "scale_2"}
    given = {renamed.get(key, key): value for key, value in given.items()}
    usual: dict[str, tuple[str, Section]] = {
        "lognormal": ("LogNormal", {}),
        "loglogistic": ("LogLogistic", {"loc": math.log(sigma_data), "scale": 0.5}),
        "loguniform": ("LogUniform", bounds),
        "v-diffusion": ("VDiffusion", {"sigma_data": sigma_data}),
        "cosine": ("VDiffusion", {"sigma_data": sigma_data}),
        "split-lognormal": ("SplitLogNormal", {}),
        "cosine-interpolated": ("CosineInterpolated", {
            "image_d": size, "noise_d_low": 32, "noise_d_high": size, "sigma_data": sigma_data,
            "min_value": min(bounds["min_value"], 1e-3), "max_value": max(bounds["max_value"], 1e3),
        }),
    }  # fmt: skip
    if kind not in usual:
        raise UserError(f"config: model.sigma_sample_density.type is {kind!r}; it may be {', '.join(usual)}")
    name, numbers = usual[kind]
    return {"target": f"ldm.k_diffusion.densities.{name}", "params": numbers | given}


def schedule(section: Section) -> Section:
    """The section of the learning rate's schedule.

    Raises:
        UserError: there is no such schedule.
    """
    given = {key: value for key, value in section.items() if key not in ("type", "min_lr")}
    if section["type"] == "inverse":
        return {"target": "ldm.lr_scheduler.LambdaInverseScheduler", "params": given}
    if section["type"] == "exponential":
        return {"target": "ldm.lr_scheduler.LambdaExponentialScheduler", "params": given}
    if section["type"] == "constant":
        constant = {"power": 0.0, "warmup": given.get("warmup", 0.0)}
        return {"target": "ldm.lr_scheduler.LambdaInverseScheduler", "params": constant}
    raise UserError(f"config: lr_sched.type is {section['type']!r}; it may be inverse, exponential or constant")


def dataset(section: Section, size: int) -> Section:
    """The section of the training images; of a kind that is unknown here they become a folder, see `unknown_data`."""
    kind, place = section["type"], section.get("location")
    torchvision = {"cifar10": "CIFAR10", "mnist": "MNIST"}
    if kind in torchvision:
        params = {"name": torchvision[kind], "data_root": place, "size": size}
        return {"target": "ldm.data.tables.TorchvisionImages", "params": params}
    if kind == "huggingface":
        column = section.get("image_key") or section.get("key") or "image"
        params = {"path": place, "image_column": column, "size": size, "caption": ""}
        return {"target": "ldm.data.tables.HuggingFaceImages", "params": params}
    params = {"data_root": place, "size": size, "caption": ""}
    return {"target": "ldm.data.captioned.CaptionedFolder", "params": params}


def unknown_data(config: Mapping[str, Section]) -> str | None:
    """What to do about a config's data set of a kind that its author's own code reads; None for a known one."""
    kind = config["dataset"]["type"]
    if kind in DATASETS:
        return None
    return f"dataset.type {kind!r} is none of {', '.join(DATASETS)}: name a folder of its images, data_root in the yaml"
