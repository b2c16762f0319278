"""A Flash student of a few thousand numbers, on the pixels of 8x8 pictures with a text encoder of characters."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.distillation.flash import FlashDiffusion
from tests.goldens.fill import data, fill

UNET: dict[str, Any] = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2],
    "num_res_blocks": 1, "channel_mult": [1, 1], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 24,
    "legacy": False,
}  # fmt: skip
PHASE = {"steps": 1000, "modes": [0.25, 0.25, 0.25, 0.25], "distillation": 0.9, "matching": 0.5, "adversarial": 0.3}
BATCH = {"image": data("flash", (3, 8, 8, 4)), "caption": ["a cat", "two dogs", "the sea"]}


class Words(nn.Module):
    """A text encoder of one embedding a character."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 24)

    def forward(self, texts: list[str]) -> torch.Tensor:
        return self.table(torch.tensor([[ord(c) % 256 for c in t.ljust(6)[:6]] for t in texts]))


def teacher_config(unet: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Yaml of the teacher."""
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET | (unet or {})}
    params = {
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {"target": f"{__name__}.Words"},
        "unet_config": network,
        **dict(image_size=8, channels=4, linear_start=0.00085, linear_end=0.012),
        **dict(cond_stage_key="caption", conditioning_key="crossattn", use_ema=False),
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params | settings}


def flash(teacher: dict[str, Any] | None = None, **settings: Any) -> FlashDiffusion:
    """A trainer with a filled teacher, and a student whose LoRA does something already."""
    params = {"teacher_steps": 8, "guidance": [2.0, 4.0], "phases": [PHASE], "lora_config": {"rank": 2}} | settings
    config = OmegaConf.create({"teacher_config": teacher or teacher_config(), **params})
    model = FlashDiffusion(**config)
    fill(model.teacher.model)
    fill(model.teacher.cond_stage_model)
    model.teacher_loaded = True
    model.make_student()
    fill_lora(model)
    return model


def fill_lora(model: FlashDiffusion) -> None:
    """Give the LoRA values that are a function of names."""
    for name, parameter in model.student.named_parameters():
        if parameter.requires_grad:
            parameter.data = data(name, tuple(parameter.shape), 0.1)
