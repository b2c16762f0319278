"""Encode a training set's images and captions once, to disk; training then runs without its two encoders.

python scripts/cache_latents.py --base configs/immiscible/tiny-assignment.yaml --outdir cache/tiny
python main.py --base configs/immiscible/tiny-assignment.yaml -t data.params.cache_latents=cache/tiny
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Encode a training set's images and captions once, to disk.")
    flag = parser.add_argument
    flag("-b", "--base", nargs="+", required=True, metavar="config.yaml",
         help="the yaml files of the training, merged left to right; then key.subkey=value overrides")  # fmt: skip
    flag("--ckpt", help="checkpoint with the autoencoder and the text encoder, where the yaml names none")
    flag("--outdir", required=True, help="folder for the cache, new or one that this program wrote")
    flag("--batch_size", type=int, default=16, help="samples encoded at a time")
    flag("--num_workers", type=int, default=0, help="processes that read images")
    flag("--samples_per_file", type=int, default=512, help="what is lost at most when the program is stopped")
    flag("--half", action="store_true", help="16-bit numbers: half the space, the losses change in the fourth digit")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("overrides", nargs="*", default=[], help="key.subkey=value, over the yaml")
    return parser


def check(options: Any) -> None:
    """Raise UserError for numbers and paths that cannot be."""
    for name, least in (("batch_size", 1), ("num_workers", 0), ("samples_per_file", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")
    if options.ckpt and not Path(options.ckpt).exists():
        raise UserError(f"--ckpt: there is no checkpoint '{options.ckpt}'")
    if Path(options.outdir).exists() and not Path(options.outdir).is_dir():
        raise UserError(f"--outdir: '{options.outdir}' is a file, not a folder")


def read_config(options: Any) -> Any:
    """The merged yaml; a UserError unless it is of a latent diffusion model with a training set."""
    from ldm.util import load_yaml

    words = [*options.base, *options.overrides]
    config = load_yaml(*[w for w in words if "=" not in w], overrides=[w for w in words if "=" in w])
    teacher = (config.get("model") or {}).get("params", {}).get("teacher_config") or {}
    if "target" in teacher:  # a student of fewer steps: what encodes is its teacher's
        config.model = teacher
    if not (config.get("model") or {}).get("params", {}).get("first_stage_config"):
        raise UserError("--base: the model has no first_stage_config, so no latents")
    if not (config.get("data") or {}).get("params", {}).get("train"):
        raise UserError("--base: the yaml has no data.params.train")
    if "dream" in config.data.target:
        raise UserError(f"--base: {config.data.target} encodes its photos itself, before training")
    return config


def load_encoders(config: Any, ckpt: str | None, device: str) -> Any:
    """The model with its encoders' weights; in place of the network, which encodes nothing, it has an identity."""
    import torch

    from ldm.checkpoint import load_into
    from ldm.util import instantiate_from_config, pick_device

    config = config.copy()
    params = config.model.params
    own = None if params.get("load_only_unet") else params.get("ckpt_path")
    params |= {"unet_config": {"target": "torch.nn.Identity"}, "use_ema": False, "ckpt_path": None}
    device = pick_device(device)
    model = instantiate_from_config(config.model)
    for path in filter(None, (own, ckpt)):
        load_into(model, path, ignore_keys=("model.", "model_ema.", *params.get("ignore_keys", ())))
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def main(argv: Sequence[str]) -> None:
    """Parse the flags, encode, say what there is."""
    options = parser().parse_args(argv)
    check(options)
    config = read_config(options)

    from ldm.data.latent_cache import LatentCache, size_of
    from ldm.memory import keep_freed
    from ldm.modules.fast_layers import sped_up
    from ldm.util import instantiate_from_config

    section = config.data.params.train
    dataset = instantiate_from_config(section)
    model = load_encoders(config, options.ckpt, options.device)
    cache = LatentCache(options.outdir)
    settings = {name: getattr(options, name) for name in ("batch_size", "num_workers", "samples_per_file", "half")}
    keep_freed()
    with sped_up(model):
        worked = cache.build(model, dataset, section, **settings)
    size = size_of(cache.directory.glob("*.safetensors"))
    broken = getattr(dataset, "broken", 0)
    lost = f", {broken} broken ones replaced" if broken else ""
    print(f"{options.outdir} {'holds' if worked else 'is current:'} {len(dataset)} samples{lost}, {size:.1f} MiB")
    training = ["python", "main.py", "--base", *options.base, *options.overrides, "-t"]
    training += ["--actual_resume", options.ckpt] if options.ckpt else []
    print(f"Train on it: {shlex.join([*training, f'data.params.cache_latents={options.outdir}'])}")


if __name__ == "__main__":
    cli.run(main)
