"""A random safety checker of a few thousand numbers, as files."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm import safety


def write_checker(folder: Path, threshold: float, pipeline: bool = False) -> dict[str, torch.Tensor]:
    """A random safety checker of diffusers', and its weights.

    Args:
        threshold: similarities lie within [-1, 1], so 2 blocks nothing and -2 everything.
        pipeline: lay the two parts where a diffusers pipeline's folder has them.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16))
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(threshold)
    one, other = (folder / part if pipeline else folder for part in safety.IN_PIPELINE)
    checker.save_pretrained(one)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(other)
    return checker.state_dict()
