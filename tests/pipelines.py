"""Small random Stable Diffusion pipelines, made by diffusers, of v1's and v2's shape."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ldm.exchange.tokenizer import write_tokenizer

WIDTH, TOKENS = 32, 77
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "sample_size": 32,
    "scaling_factor": 0.3,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
V2_UNET = {"attention_head_dim": (2, 4), "use_linear_projection": True}
# kind: what differs in U-Net, text encoder, scheduler
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "v1": ({}, {"hidden_act": "quick_gelu"}, {}),
    "v1-deep": (
        {
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        {"hidden_act": "quick_gelu"},
        {},
    ),
    "pruned": ({"mid_block_type": None}, {"hidden_act": "quick_gelu"}, {}),  # as segmind's tiny-sd
    "v2": (V2_UNET, {"hidden_act": "gelu"}, {}),
    "v2-v": (V2_UNET, {"hidden_act": "gelu"}, {"prediction_type": "v_prediction"}),
}


@lru_cache(maxsize=1)
def libraries() -> Any:
    """diffusers and transformers, whose import takes seconds, silent and without progress bars."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return diffusers, transformers


def pipeline(kind: str, folder: Path, scheduler: str = "DDIMScheduler") -> Any:
    """A pipeline of `KINDS`; every weight is random, zero-initialised and norms included. It draws 32x32 pictures."""
    diffusers, transformers = libraries()
    unet, text, schedule = KINDS[kind]
    write_tokenizer(folder / "tokenizer", TOKENS, "!" if kind.startswith("v2") else "<|endoftext|>")
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET | unet),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | text)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(**SCHEDULE | schedule, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if scheduler == "PNDMScheduler":
        pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        shake(module)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def shake(module: torch.nn.Module) -> None:
    """Add noise to every weight, so that none is zero or one and a swapped name shows."""
    for parameter in module.eval().parameters():
        parameter += 0.05 * torch.randn_like(parameter)
