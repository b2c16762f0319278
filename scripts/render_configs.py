"""Write the yaml files of configs/sd-inject-dreambooth, which differ only in their adapters, from a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from ldm import cli
from ldm.errors import UserError

DIRECTORY = Path(__file__).resolve().parent.parent / "configs" / "sd-inject-dreambooth"

# Input position -> output positions of the transformer adapters; each has the hidden width 60.
TRANSFORMER = {
    "attn1i": ("attn1i", "attn2i", "ffni", "transo"),
    "attn1o": ("attn2i", "ffni", "transo"),
    "attn2i": ("attn2i", "ffni", "transo"),
    "attn2c": ("attn2c",),
    "attn2o": ("ffni", "transo"),
    "ffni": ("ffni", "transo"),
    "ffno": ("transo",),
    "transo": ("transo",),
}
# Input and output position -> hidden width of the residual adapters: about 3.3 million parameters each.
RESIDUAL = {("resi", "resi"): 6, ("resi", "reso"): 7, ("reso", "reso"): 9}

TRANSFORMER_ENTRY = Template("""\
          transformer_adp_config:
            - type: inout
              din: $din
              dout: $dout
              mid_dim: 60
              method: default
              scale: 1.0""")

RESIDUAL_ENTRY = Template("""\
          resblock_adp_config:
            type: inout
            din: $din
            dout: $dout
            method: default
            mid_dim: $mid_dim
            scale: 1.0""")

PAGE = Template("""\
# DreamBooth with adapters in Stable Diffusion v1: input $din, output $dout.
# Rendered by scripts/render_configs.py: change its table, not this file.
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm_dream.LatentDiffusion
  params:
    reg_weight: 1.0
    train_level: [adapter]
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: image
    cond_stage_key: caption
    image_size: 64
    channels: 4
    cond_stage_trainable: true  # as in the adapter paper's files; train_level decides what is trained
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False

    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel_inject.UNetModel_inject
      params:
        image_size: 32  # unused
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: True
        legacy: False
        adapter_config:
$adapter

    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 512
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity

    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder

data:
  target: main_dream_booth.DataModuleFromConfig
  params:
    batch_size: 1
    num_workers: 2
    wrap: false
    train:
      target: ldm.data.personalized_dream.PersonalizedBase
      params:
        size: 512
        set: train
        per_image_tokens: False
        repeats: 100
    reg:
      target: ldm.data.personalized_dream.PersonalizedBase
      params:
        size: 512
        set: train
        reg: True
        per_image_tokens: False
        repeats: 10
    validation:
      target: ldm.data.personalized_dream.PersonalizedBase
      params:
        size: 512
        set: val
        per_image_tokens: False
        repeats: 10

lightning:
  modelcheckpoint:
    params:
      every_n_train_steps: 500
  callbacks:
    image_logger:
      target: main_dream_booth.ImageLogger
      params:
        batch_frequency: 500
        max_images: 8
        increase_log_steps: False
  trainer:
    benchmark: True
    max_steps: 3000
""")


def render_all() -> dict[str, str]:
    """File name -> text of every file of the family."""
    entries = {
        (din, dout): TRANSFORMER_ENTRY.substitute(din=din, dout=dout)
        for din, outputs in TRANSFORMER.items()
        for dout in outputs
    }
    for (din, dout), mid_dim in RESIDUAL.items():
        entries[din, dout] = RESIDUAL_ENTRY.substitute(din=din, dout=dout, mid_dim=mid_dim)
    return {
        f"{din}-{dout}.yaml": PAGE.substitute(din=din, dout=dout, adapter=entry)
        for (din, dout), entry in entries.items()
    }


def stale_files(directory: Path) -> list[str]:
    """Names of files in `directory` that are not, or not any more, what the table says."""
    wanted = render_all()
    there = {file.name: file.read_text(encoding="utf-8") for file in directory.glob("*.yaml")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def write_all(directory: Path) -> None:
    """Write every file that is not current; one that the table does not know is an error."""
    from ldm.util import atomic_path

    wanted = render_all()
    for name in stale_files(directory):
        if name not in wanted:
            raise UserError(f"{directory / name} is not in the table; delete it or add it to the table")
        with atomic_path(directory / name) as temporary:
            temporary.write_text(wanted[name], encoding="utf-8")
        print(f"wrote {directory / name}")


def main(argv: Sequence[str]) -> None:
    """Write the files, or with --check only say whether they are current."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--outdir", type=Path, default=DIRECTORY, help="directory of the yaml files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not current")
    options = parser.parse_args(argv)
    if not options.check:
        write_all(options.outdir)
    elif stale := stale_files(options.outdir):
        raise UserError(f"{options.outdir}: not current: {', '.join(stale)}; run scripts/render_configs.py")


if __name__ == "__main__":
    cli.run(main)
