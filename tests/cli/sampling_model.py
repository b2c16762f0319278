"""A random Stable-Diffusion-shaped model of a few hundred thousand numbers, as files, for command-line tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.programs import ROOT

YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    first_stage_key: image
    cond_stage_key: caption
    conditioning_key: crossattn
    image_size: 8
    channels: 4
    scale_factor: 0.5
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 4
        out_channels: 4
        model_channels: 32
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 2]
        num_heads: 2
        use_spatial_transformer: true
        context_dim: 32
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 32
          in_channels: 3
          out_ch: 3
          ch: 32
          ch_mult: [1, 1, 1]
          num_res_blocks: 1
          attn_resolutions: []
          dropout: 0.0
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        architecture: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
"""


INPAINTING = ("model.params.unet_config.params.in_channels=9", "model.params.conditioning_key=hybrid")


def write_model(folder: Path, overrides: Sequence[str] = ()) -> tuple[Path, Path]:
    """(yaml, checkpoint) of a random model; pictures are 32x32, f is 4, and sizes are multiples of 8.

    Args:
        overrides: key.subkey=value, over `YAML`.
    """
    import torch
    from omegaconf import OmegaConf

    from ldm.checkpoint import save_checkpoint
    from ldm.util import instantiate_from_config, load_yaml
    from tests.goldens.fill import fill

    config = folder / "model.yaml"
    config.write_text(YAML, encoding="utf-8")
    OmegaConf.save(load_yaml(config, overrides=list(overrides)), config)
    torch.manual_seed(0)
    model = instantiate_from_config(load_yaml(config).model)
    fill(model.model)  # zero-initialised layers would hide the prompt
    checkpoint = folder / "model.ckpt"
    save_checkpoint(model.state_dict(), checkpoint)
    return config, checkpoint


def main_of(script: str) -> Callable[[list[str]], None]:
    """The `main(argv)` of a program of the repository."""
    spec = importlib.util.spec_from_file_location(f"program_{Path(script).stem}", ROOT / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # data classes look themselves up there
    spec.loader.exec_module(module)
    return module.main
