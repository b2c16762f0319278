"""The way through scripts/sample_diffusion.py: flags, the run's files, pictures and numbers on disk."""

from __future__ import annotations

import argparse
import datetime
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import cli
from ldm.cli_checks import check_seed_and_checker, read_image
from ldm.cli_sampling import add_model_flags, protection_for, say_if_too_small
from ldm.errors import UserError

# Folders that the published weights are unpacked to -> their yaml, for when there is no config.yaml beside them.
PUBLISHED = {
    "celeba256": "celebahq-ldm-vq-4",
    "ffhq256": "ffhq-ldm-vq-4",
    "lsun_beds256": "lsun_bedrooms-ldm-vq-4",
    "lsun_churches256": "lsun_churches-ldm-kl-8",
    "cin256": "cin-ldm-vq-f8",
    "cin256-v2": "cin256-v2",
    "bsr_sr": "bsr_sr",
    "semantic_synthesis256": "semantic_synthesis256",
    "semantic_synthesis512": "semantic_synthesis512",
}
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "latent-diffusion"
WEIGHTS = ("model.ckpt", "model.safetensors", "checkpoints/last.ckpt")  # in a folder, the first that is there


def parser() -> cli.ArgumentParser:
    """The flags of latent diffusion's sample_diffusion.py, and what it does not have."""
    parser = cli.ArgumentParser(description="Draw with models that no prompt leads: unconditional, by class, by image.")
    flag = parser.add_argument
    flag("-r", "--resume", nargs="?", help="a folder with model.ckpt and config.yaml, a run's folder, or a checkpoint")
    flag("-n", "--n_samples", type=int, nargs="?", default=50000, help="number of samples to draw")
    flag("-e", "--eta", type=float, nargs="?", default=1.0,
         help="eta for ddim sampling (0.0 yields deterministic sampling)")  # fmt: skip
    flag("-v", "--vanilla_sample", action="store_true", help="sample by all of the model's timesteps instead of DDIM")
    flag("-l", "--logdir", nargs="?", default="none", help="where to write; none for the model's own folder")
    flag("-c", "--custom_steps", type=int, nargs="?", default=50, help="number of steps for ddim sampling")
    flag("--batch_size", type=int, nargs="?", default=10, help="the bs")
    flag("overrides", nargs="*", help="key.subkey=value, over the yaml")
    flag = parser.add_argument_group("beyond the original script").add_argument
    flag(
        "--config",
        help="the model's yaml (default: that of the checkpoint's name or config.yaml beside it, or the run's)",
    )
    flag("--classes", help="classes to draw by turns, e.g. 25,187 (default: all of them)")
    flag("--scale", type=float, default=1.0, help="guidance scale; 1 for none. By class, others need --null_class")
    flag("--null_class", type=int, help="the class that stands for none (1000 in cin256-v2)")
    flag("--image", help="what leads a model: an image to vary, a small one to enlarge, or a map of class numbers")
    flag("--sampler", help="for models of pixels (KarrasDiffusion): one of k-diffusion's, e.g. heun, dpmpp_2m_sde "
         "(default: dpmpp_2m); they take -c steps, and -e where they draw noise")  # fmt: skip
    flag("--schedule", help="the sampler's noise levels: karras (default), exponential, polyexponential or vp")
    flag("--seed", type=int, default=42, help="seed of the first picture; the next ones count on from it")
    add_model_flags(flag)
    return parser


@dataclass(frozen=True)
class Source:
    """Where the model comes from, and the folder that it lies in."""

    ckpt: Path
    folder: Path
    configs: Sequence[Path]


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flag values that cannot be; turns `options.classes` into numbers."""
    for name in ("n_samples", "custom_steps", "batch_size"):
        if (getattr(options, name) or 0) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.eta is None or not 0.0 <= options.eta <= 1.0:
        raise UserError(f"--eta {options.eta}: must be between 0 and 1")
    check_seed_and_checker(options)
    try:
        options.classes = [int(word) for word in (options.classes or "").split(",") if word]
    except ValueError as error:
        raise UserError(f"--classes {options.classes}: expected numbers, such as 25,187") from error


def find_source(options: argparse.Namespace) -> Source:
    """The checkpoint and yaml files that --resume and --config name.

    Raises:
        UserError: one of them is not there.
    """
    if not options.resume:
        raise UserError("-r/--resume: needs the folder of a model (model.ckpt and config.yaml), or a checkpoint")
    named = Path(options.resume)
    if named.is_file():
        folder = named.parent.parent if named.parent.name == "checkpoints" else named.parent
        ckpt = named
    elif named.is_dir():
        there = [named / name for name in WEIGHTS if (named / name).is_file()]
        if not there:
            raise UserError(f"-r/--resume: '{named}' has none of {', '.join(WEIGHTS)}")
        folder, ckpt = named, there[0]
    else:
        raise UserError(f"-r/--resume: there is no folder or file '{named}'")
    if options.config:
        return Source(ckpt, folder, [Path(options.config)])
    own = next((path for path in (ckpt.with_suffix(".yaml"), folder / "config.yaml") if path.is_file()), None)
    configs = [own] if own else sorted((folder / "configs").glob("*.yaml"))
    published = PUBLISHED.get(folder.resolve().name)
    if not configs and published:
        configs = [CONFIGS / f"{published}.yaml"]
        print(f"'{folder}' has no config.yaml; reading {published}.yaml of configs/latent-diffusion")
    if not configs:
        raise UserError(f"-r/--resume: '{folder}' has no config.yaml; name the model's yaml with --config")
    return Source(ckpt, folder, configs)


def sample(options: argparse.Namespace) -> None:
    """Check everything, load the model, draw, and write files.

    Raises:
        UserError: a flag, file or setting is wrong; the model is built last.
    """
    check(options)
    source = find_source(options)
    image = read_image(options.image, "--image") if options.image else None

    from ldm import checkpoint, loading
    from ldm.modules.pictures import save_picture
    from ldm.util import load_yaml, pick_device

    device = pick_device(options.device)
    config = load_yaml(*source.configs, overrides=options.overrides)
    checkpoint.check_file(source.ckpt, options.allow_pickle)
    model = loading.build_model(config)
    condition = condition_of(options, model, image)
    how = pixel_sampler(options, model)
    if how is None and options.custom_steps > model.num_timesteps and not options.vanilla_sample:
        raise UserError(f"--custom_steps {options.custom_steps}: this model has {model.num_timesteps} timesteps")
    protection = protection_for(options, model, config, source.ckpt)
    model = loading.load_model(config, source.ckpt, device, allow_pickle=options.allow_pickle, model=model)
    folder = _output_folder(options, source)
    batches = batches_of(options, model, condition, how)
    files: list[Path] = []
    for images in batches:
        if not files:
            say_if_too_small(images[0], protection)
        for shown, blocked in zip(*protection.apply(images), strict=True):
            files.append(folder / "img" / f"sample_{len(files):06}.png")
            save_picture(shown, files[-1])
            if blocked:
                print(f"The safety checker blocked {files[-1].name}; it is black.")
    print(f"Your samples are ready and waiting for you here: {folder / 'img'}, and as {write_numbers(files, folder)}")


def pixel_sampler(options: argparse.Namespace, model: Any) -> Any:
    """How a model of pixels is drawn with; None for one of latents.

    Raises:
        UserError: the flags do not go with the model, or with each other.
    """
    from ldm.k_diffusion.training import KarrasDiffusion

    if not isinstance(model, KarrasDiffusion):
        for name in ("sampler", "schedule"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: is for models of pixels (KarrasDiffusion); this one is drawn with by DDIM")
        return None
    if options.vanilla_sample:
        raise UserError("--vanilla_sample: this model has no timesteps; choose a --sampler and -c steps")
    if options.precision in ("bf16", "fp16"):
        raise UserError(f"--precision {options.precision}: models of pixels are drawn with in full precision")
    from ldm.k_diffusion.pixels import PixelSampler
    from ldm.samplers import SAMPLERS

    sampler = options.sampler or "dpmpp_2m"
    noisy = sampler in SAMPLERS and SAMPLERS[sampler].eta is not None
    return PixelSampler(options.custom_steps, sampler, options.schedule, options.eta if noisy else None)


def batches_of(options: argparse.Namespace, model: Any, condition: Any, how: Any) -> Iterator[list[Any]]:
    """The pictures that the flags ask for, batch by batch; `how` is of `pixel_sampler`."""
    from ldm.unprompted import draw, draw_pixels

    seeds = range(options.seed, options.seed + options.n_samples)
    if how is not None:
        return draw_pixels(model, seeds, how, batch_size=options.batch_size)
    return draw(
        model,
        seeds,
        condition,
        steps=options.custom_steps,
        eta=options.eta,
        vanilla=options.vanilla_sample,
        scale=options.scale,
        batch_size=options.batch_size,
        precision=options.precision,
        vae_tiling=options.vae_tiling,
        attention_slicing=options.attention_slicing,
    )


def condition_of(options: argparse.Namespace, model: Any, image: Any) -> Any:
    """What leads the pictures.

    Raises:
        UserError: the flags do not go with the model.
    """
    from ldm.unprompted import UNLED, by_class, by_image, kind_of_condition

    kind = kind_of_condition(model)
    for name, value, of in (("classes", options.classes, "class"), ("null_class", options.null_class, "class"),
                            ("image", image, "image")):  # fmt: skip
        if value not in (None, []) and kind != of:
            raise UserError(f"--{name}: this model is led by {kind}; leave the flag out")
    if kind == "image" and image is None:
        raise UserError(f"--image: this model is led by an image ({model.cond_stage_key}); name one")
    guided = options.scale != 1.0
    if guided and kind == "class" and options.null_class is None:
        raise UserError(f"--scale {options.scale:g}: guidance needs --null_class, the class that stands for none")
    if guided and getattr(model.model, "conditioning_key", None) in (None, "concat"):
        raise UserError(f"--scale {options.scale:g}: this model cannot be guided; leave the flag out")
    if kind == "class":
        return by_class(model, options.classes, options.null_class if guided else None)
    return by_image(model, image) if kind == "image" else UNLED


def _output_folder(options: argparse.Namespace, source: Source) -> Path:
    """`samples/NAME/DATE` under the model's folder or --logdir, with the settings as a yaml."""
    import yaml

    from ldm.util import atomic_path

    place = source.folder
    if options.logdir and options.logdir != "none":
        place = Path(options.logdir) / source.folder.resolve().name
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    folder = place / "samples" / source.ckpt.stem / now
    try:
        (folder / "img").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--logdir: cannot write to '{folder}': {error.strerror}") from error
    with atomic_path(folder / "sampling_config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(vars(options)), encoding="utf-8")
    return folder


def write_numbers(files: Sequence[Path], folder: str | os.PathLike[str]) -> Path:
    """All pictures as one array [N, H, W, 3] of bytes, `arr_0` of numpy/NxHxWx3-samples.npz, as evaluations want it.

    The array is never whole in memory.
    """
    import numpy as np
    from PIL import Image

    from ldm.util import atomic_path

    with Image.open(files[0]) as first:
        shape = (len(files), first.height, first.width, 3)
    path = Path(folder) / "numpy" / f"{'x'.join(map(str, shape))}-samples.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            for name in files:
                with Image.open(name) as image:
                    file.write(np.asarray(image.convert("RGB")).tobytes())
    return path
