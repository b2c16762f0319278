"""Stable Diffusion v1 with random weights, as files that both sides read: the same numbers on both.

Neither time nor memory depends on what the weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.side_by_side import Settings

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
ADAPTERS = ROOT / "configs" / "sd-inject-dreambooth" / "attn2o-ffni.yaml"
# What differs in the tiny model's yaml.
TINY: dict[str, Any] = {
    "image_size": 16,
    "unet_config.params.model_channels": 32,
    "unet_config.params.context_dim": 32,
    "first_stage_config.params.ddconfig.ch": 32,
    "cond_stage_config.params": {
        "architecture": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
    },
}  # fmt: skip
PROMPTS = ("a photo of a sks dog", "a photo of a dog")
# What the two sides import; the time and the memory of this count on neither side.
OURS = ("ldm.inference", "ldm.models.diffusion.ddpm_dream", "ldm.models.diffusion.plms", "ldm.models.autoencoder",
        "ldm.modules.diffusionmodules.openaimodel_inject", "transformers.models.clip.modeling_clip")  # fmt: skip
THEIRS = ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft")


def config_of(path: Path, size: str, **changes: Any) -> Any:
    """The yaml of the model, at a size, with some of `model.params` changed; double underscores stand for dots."""
    from omegaconf import OmegaConf

    from ldm.util import load_yaml

    config = load_yaml(path)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in ((TINY if size == "tiny" else {}) | changes).items():
        OmegaConf.update(config.model.params, key, value, force_add=True)
    return config


def pipeline(settings: Settings) -> Path:
    """The diffusers folder with the weights of a size, written when it is not there."""
    return settings.folder / settings.size / "pipeline"


def write(settings: Settings, files: bool = False) -> Path:
    """Write what is not there yet: the diffusers folder, and with `files` the same as model.safetensors and .ckpt."""
    from ldm.exchange.folder import write_folder
    from ldm.util import atomic_path
    from ldm.weight_files import read_state_dict, write_tensors

    folder, config = pipeline(settings).parent, config_of(YAML, settings.size)
    if not pipeline(settings).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(weights(config), config, pipeline(settings))
    kinds = [kind for kind in ("safetensors", "ckpt") if files and not (folder / f"model.{kind}").is_file()]
    for kind in kinds:
        with atomic_path(folder / f"model.{kind}") as temporary:
            write_tensors(read_state_dict(pipeline(settings)), temporary, kind)
    return folder


def weights(config: Any) -> dict[str, Any]:
    """Random weights: those of norms around 1, so that no signal dies out on its way through the layers."""
    import torch

    from ldm.loading import build_model

    torch.manual_seed(0)

    def draw(key: str, like: torch.Tensor) -> torch.Tensor:
        centre = float(like.ndim == 1 and key.endswith("weight"))
        return torch.randn(like.shape).mul_(0.02).add_(centre)

    return {
        key: draw(key, value) if value.is_meta else value for key, value in build_model(config).state_dict().items()
    }


def ours(settings: Settings) -> Any:
    """The model as our programs load it, in the precision that the device is measured in."""
    from ldm.loading import load_model
    from ldm.precision import set_precision

    model = load_model(None, pipeline(settings), settings.device)
    set_precision(model, "bf16" if settings.device != "cpu" else "full")
    return model


def theirs(settings: Settings) -> Any:
    """diffusers' pipeline as its documentation on speed has it: convolutions in channels_last, SDPA (its default)."""
    import torch
    import transformers
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(pipeline(settings), local_files_only=True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(settings.device, torch.bfloat16 if settings.device != "cpu" else torch.float32)


def latent_side(settings: Settings) -> int:
    """Of the latents of a picture of the model's size: 64 for 512 pixels."""
    return 64 if settings.full else TINY["image_size"]


def draw(*shape: int, seed: int = 0) -> Any:
    """Normal numbers that are the same on both sides."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size_of(*modules: Any) -> int:
    """Bytes of the weights, which any pass must read."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
