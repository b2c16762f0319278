"""Draw with an unconditional model, led towards a text by CLIP.

python scripts/sample_clip_guided.py "a red flower" -r logs/RUN --clip_model ViT-B-32 --clip_weights ViT-B-32.pt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError


def parser() -> cli.ArgumentParser:
    """The flags, k-diffusion's among them."""
    parser = cli.ArgumentParser(description="Draw with an unconditional model, led towards a text by CLIP.")
    flag = parser.add_argument
    flag("prompt", help="the text")
    flag("-r", "--resume", "--checkpoint", required=True,
         help="a folder with model.ckpt and config.yaml, a run's folder, or a checkpoint")  # fmt: skip
    flag("--config", help="the model's yaml (default: that beside the checkpoint, or the run's)")
    flag("-cgs", "--clip_guidance_scale", "--clip-guidance-scale", type=float, default=500.0,
         help="how strongly CLIP leads; 0 for not at all")  # fmt: skip
    flag("--clip_model", "--clip-model", default="ViT-B-16",
         help="open_clip's name, a folder with open_clip_config.json and weights, or hf-hub:OWNER/MODEL")  # fmt: skip
    flag("--clip_weights", help="of one of open_clip's names: a file, or a tag that open_clip downloads, e.g. openai")
    flag("--cutouts", type=int, default=8, help="views that CLIP has of a picture in a step: the whole, and squares")
    flag("-n", "--n_samples", type=int, default=64, help="pictures")
    flag("--batch_size", "--batch-size", type=int, default=16, help="pictures at a time")
    flag("--steps", type=int, default=100, help="of the sampler")
    flag("--sampler", default="dpmpp_2s_ancestral", help="any of k-diffusion's, e.g. euler, dpmpp_2m_sde")
    flag("--schedule", help="its noise levels: karras (when not given), exponential, polyexponential or vp")
    flag("--eta", type=float, help="noise of the steps of ancestral samplers and SDEs, 0 to 1; 1 when not given")
    flag("--seed", type=int, default=0, help="of the first picture; the next ones count on from it")
    flag("--prefix", default="outputs/clip-guided/out", help="pictures are PREFIX_00000.png and so on")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--allow_pickle", action="store_true",
         help="unpickle a .ckpt that imports other things than weights: it may run any code")  # fmt: skip
    flag("overrides", nargs="*", help="key.subkey=value, over the yaml")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for values that cannot be."""
    for name, least in (("cutouts", 1), ("n_samples", 1), ("batch_size", 1), ("steps", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")
    if not 0 <= options.clip_guidance_scale < float("inf"):
        raise UserError(f"--clip_guidance_scale {options.clip_guidance_scale:g}: must be a number of 0 or more")
    if not options.prompt or not options.prefix:
        raise UserError("the text and --prefix need a value")


def load(options: argparse.Namespace, source: Any, device: Any) -> Any:
    """The diffusion model, as a `LoadedModel`.

    Raises:
        UserError: it cannot be read, or something leads it.
    """
    from ldm import checkpoint, loading
    from ldm.k_diffusion.loaded import LoadedModel
    from ldm.util import load_yaml

    config = load_yaml(*source.configs, overrides=options.overrides)
    checkpoint.check_file(source.ckpt, options.allow_pickle)
    model = LoadedModel(loading.load_model(config, source.ckpt, device, allow_pickle=options.allow_pickle))
    if not model.unconditional:
        raise UserError("-r/--resume: this model is led by something else; CLIP leads unconditional ones")
    return model


def draw(options: argparse.Namespace, model: Any, clip: Any, how: Any) -> Iterator[Any]:
    """Images [B, C, H, W] in [-1, 1], batch by batch."""
    from tqdm import tqdm

    from ldm.k_diffusion.clip_guidance import ClipGuidance, Cutouts
    from ldm.models.diffusion.trainer import noises
    from ldm.modules.randomness import sample_seed
    from ldm.samplers import SAMPLERS

    size = 1 if SAMPLERS[how.sampler].alone else options.batch_size
    for first in range(0, options.n_samples, size):
        seeds = range(options.seed + first, options.seed + min(first + size, options.n_samples))
        led = ClipGuidance(
            model, clip, options.prompt, options.clip_guidance_scale,
            generators=[cuts for seed in seeds for cuts in noises(sample_seed(seed, "cutouts"), 1)],
            cutouts=Cutouts(options.cutouts), decode=model.decode, limit=None if model.of_latents else 1.0,
        )  # fmt: skip
        with tqdm(desc=f"{how.title}, picture {first} of {options.n_samples}", unit="step") as bar:
            generators = noises(seeds[0], len(seeds))
            x = how.draw(led, model.shape, generators, model.model.device, model.sigma_min, model.sigma_max,
                         lambda _, bar=bar: bar.update())  # fmt: skip
        if not x.isfinite().all():
            raise UserError("sampling gave values that are not numbers; lower --clip_guidance_scale")
        yield model.decode(x).clamp(-1, 1)


def main(argv: Sequence[str]) -> None:
    """Parse the flags, find CLIP, load the model, draw, and say how like the text the pictures are."""
    options = parser().parse_intermixed_args(argv)
    check(options)
    from ldm.cli_unprompted import find_source

    source = find_source(options)

    import torch

    from ldm.k_diffusion.clip_guidance import ClipModel
    from ldm.k_diffusion.pixels import PixelSampler, as_pictures
    from ldm.modules.pictures import save_picture
    from ldm.util import pick_device

    how = PixelSampler(options.steps, options.sampler, options.schedule, options.eta)
    device = pick_device(options.device)
    clip = ClipModel.load(options.clip_model, options.clip_weights, device)
    model = load(options, source, device)
    files: list[Path] = []
    similarities = []
    with torch.no_grad():
        for images in draw(options, model, clip, how):
            similarities += clip.similarity(images, options.prompt).tolist()
            for picture in as_pictures(images):
                files.append(Path(f"{options.prefix}_{len(files):05}.png"))
                save_picture(picture, files[-1])
    mean = sum(similarities) / len(similarities)
    print(f"{files[0]} to {files[-1].name}: CLIP similarity to the text {mean:.4f} (mean of {len(files)} pictures)")


if __name__ == "__main__":
    cli.run(main)
