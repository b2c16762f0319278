"""The model zoo made small: its yaml with a few thousand random numbers in place of millions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from ldm.util import instantiate_from_config, load_yaml
from tests.goldens.fill import fill
from tests.networks import ROOT

ZOO = ROOT / "configs"
WIDTH = 32  # of whatever is made small


def shrink(section: Any, key: str = "") -> None:
    """Make a yaml's model narrow and shallow, whatever it is; its levels and the way of its condition stay."""
    small = {"model_channels": WIDTH, "ch": WIDTH, "context_dim": WIDTH, "num_res_blocks": 1, "num_head_channels": 16,
             "n_layer": 1, "ckpt_path": None, "timesteps": 20}  # fmt: skip
    for name, value in section.items():
        if isinstance(value, DictConfig):
            shrink(value, name)
        elif name == "channel_mult" or name == "ch_mult":
            section[name] = [min(mult, 2) for mult in value]
        elif name in small:
            section[name] = small[name]
    if key == "params" and "n_embed" in section:
        section.n_embed = 64 if "ddconfig" in section else WIDTH  # of the codebook, or BERT's width


def small_config(path: Path, vocabulary: Path | None = None) -> DictConfig:
    """A yaml of the zoo with everything made small, and captions' words in the file `vocabulary`."""
    config = load_yaml(path)
    shrink(config.model)
    params = config.model.params
    params.use_ema = False  # its average would be of the weights before they are filled
    levels = len(params.unet_config.params.channel_mult)
    params.image_size = params.unet_config.params.image_size = 2 ** max(3, levels - 1)
    encoder = params.cond_stage_config
    if isinstance(encoder, DictConfig):
        kind = encoder.target.rpartition(".")[2]
        tower = {"width": WIDTH, "heads": 2, "layers": 2}
        sizes = {
            "FrozenCLIPEmbedder": {
                "architecture": {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
            },
            "FrozenOpenCLIPEmbedder": {"architecture": {"embed_dim": WIDTH, "text_cfg": tower}},
            "ClassEmbedder": {"embed_dim": WIDTH},
            "BERTEmbedder": {"vocab_size": 64},
        }.get(kind, {})
        if kind == "BERTEmbedder" and vocabulary is not None and encoder.params.get("use_tokenizer", True):
            sizes["vocab_path"] = str(vocabulary)
        encoder.params = OmegaConf.merge(encoder.get("params") or {}, sizes)
    return config


def build(config: DictConfig) -> nn.Module:
    """The model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = instantiate_from_config(config.model)
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        if part is not None:
            fill(part)
    return model


def noise(mode: str, *size: int, seed: int = 0, classes: int = 256) -> Image.Image:
    """A picture of random values below `classes`."""
    channels = (3,) if mode == "RGB" else ()
    values = np.random.default_rng(seed).integers(0, classes, (*size[::-1], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)
