"""A whole model: its yaml and its state dict here, its parts' config files and weights in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.errors import UserError
from ldm.exchange import schedule, text, unet, vae
from ldm.weight_files import StateDict

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}


def _plain(config: DictConfig) -> dict[str, Any]:
    """`model.params` as dictionaries and lists."""
    return OmegaConf.to_container(config, resolve=True)["model"]["params"]


def config_from_diffusers(configs: Mapping[str, Mapping[str, Any]]) -> DictConfig:
    """The yaml of the model that a pipeline's config files (unet, vae, text_encoder, scheduler) describe.

    Raises:
        UserError: it is no model of Stable Diffusion v1's or v2's kind.
    """
    network, first_stage = unet.from_diffusers(configs["unet"]), vae.from_diffusers(configs["vae"])
    latents = first_stage["embed_dim"]
    ways = {latents: "crossattn", 2 * latents + 1: "hybrid"}  # text; inpainting: the image and the mask beside x
    if network["in_channels"] not in ways:
        known = " or ".join(map(str, ways))
        raise UserError(f"{unet.WHERE_JSON}: in_channels is {network['in_channels']}, and only {known} is supported")
    params = {
        **schedule.from_diffusers(configs["scheduler"]),
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": network["image_size"],
        "channels": latents,
        "cond_stage_trainable": False,
        "conditioning_key": ways[network["in_channels"]],
        "scale_factor": configs["vae"].get("scaling_factor", vae.THEIR_DEFAULTS["scaling_factor"]),
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
        "cond_stage_config": text.from_diffusers(configs["text_encoder"]),
    }
    name = "LatentInpaintDiffusion" if params["conditioning_key"] == "hybrid" else "LatentDiffusion"
    return OmegaConf.create({"model": {"target": f"ldm.models.diffusion.ddpm.{name}", "params": params}})


def configs_to_diffusers(config: DictConfig, scale_factor: float) -> dict[str, dict[str, Any]]:
    """The config files of a pipeline for our yaml: unet, vae, text_encoder, scheduler.

    Args:
        scale_factor: what latents are multiplied by: the yaml's, or what training has found.

    Raises:
        UserError: diffusers' Stable Diffusion pipelines have no such model.
    """
    params = _plain(config)
    for key, known in (("conditioning_key", ("crossattn", "hybrid")), ("num_timesteps_cond", (None, 1))):
        if params.get(key) not in known:
            raise UserError(f"yaml: {key}: {params.get(key)} has no counterpart in diffusers' Stable Diffusion")
    if params["first_stage_config"].get("target", "").rpartition(".")[2] != "AutoencoderKL":
        raise UserError("yaml: first_stage_config: diffusers' Stable Diffusion has an AutoencoderKL")
    return {
        "unet": unet.to_diffusers(params["unet_config"]["params"], params["image_size"]),
        "vae": vae.to_diffusers(params["first_stage_config"]["params"], scale_factor),
        "text_encoder": text.to_diffusers(params["cond_stage_config"]),
        "scheduler": schedule.to_diffusers(params),
    }


def weights_from_diffusers(parts: Mapping[str, StateDict], config: DictConfig) -> tuple[StateDict, list[str]]:
    """(the state dict of our model, keys that nothing is known of) from the weights of a pipeline's parts."""
    params = _plain(config)
    found: dict[str, StateDict] = {}
    names = unet.names(params["unet_config"]["params"])
    found["unet"] = {names.ours(k) or f"?{k}": v for k, v in parts["unet"].items()}
    names = vae.names(params["first_stage_config"]["params"]["ddconfig"])
    modern = {vae.modern(k): v for k, v in parts["vae"].items()}
    found["vae"] = {names.ours(k) or f"?{k}": vae.weight_from_diffusers(k, v) for k, v in modern.items()}
    found["text_encoder"], unknown = text.weights_from_diffusers(parts["text_encoder"], params["cond_stage_config"])
    unknown = [f"text_encoder.{key}" for key in unknown]
    unknown += [f"{part}.{k[1:]}" for part, state in found.items() for k in state if k.startswith("?")]
    state = {PREFIXES[part] + k: v for part, weights in found.items() for k, v in weights.items() if k[0] != "?"}
    return state, unknown


def weights_to_diffusers(state: StateDict, config: DictConfig) -> tuple[dict[str, StateDict], list[str]]:
    """(the weights of a pipeline's parts, keys that nothing is known of) from the state dict of our model.

    Noise schedules and the like, which lie outside the three networks, are left out.
    """
    params = _plain(config)
    inside = {
        part: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for part, prefix in PREFIXES.items()
    }
    parts: dict[str, StateDict] = {}
    unknown: list[str] = []
    tables = {
        "unet": unet.names(params["unet_config"]["params"]),
        "vae": vae.names(params["first_stage_config"]["params"]["ddconfig"]),
    }
    for part, names in tables.items():
        parts[part] = {}
        for key, value in inside[part].items():
            theirs = names.theirs(key)
            if theirs is None:
                unknown.append(PREFIXES[part] + key)
            else:
                parts[part][theirs] = vae.weight_to_diffusers(theirs, value) if part == "vae" else value
    parts["text_encoder"], rest = text.weights_to_diffusers(inside["text_encoder"], params["cond_stage_config"])
    return parts, unknown + [PREFIXES["text_encoder"] + key for key in rest]
