"""The command lines that draw pictures: their flags, their checks, and the way through them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.inference import Picture

SD_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
SD_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
TINY = "--config models/tiny/config.yaml --ckpt models/tiny/model.safetensors"
MAX_SEED = 2**32 - 1


def sampling_parser(
    description: str, outdir: str, n_samples: int, n_iter: int, scale: float, image: bool = False
) -> cli.ArgumentParser:
    """The flags of CompVis' txt2img.py (img2img.py with `image`) and of the adapter repository's sample.py.

    Args:
        outdir, n_samples, n_iter, scale: defaults, in which the original scripts differ.
    """
    parser = cli.ArgumentParser(description=description)
    flag = parser.add_argument
    flag(
        "--prompt",
        nargs="?",
        default="a painting of a virus monster playing guitar",
        help="the prompt to render",
    )
    if image:
        flag("--init-img", nargs="?", help="path to the input image")
    flag("--outdir", nargs="?", default=outdir, help="dir to write results to")
    flag("--skip_grid", action="store_true", help="do not save a grid, only individual samples")
    flag("--skip_save", action="store_true", help="do not save individual samples. For speed measurements.")
    flag("--ddim_steps", type=int, default=50, help="number of sampling steps")
    flag("--plms", action="store_true", help="use plms sampling")
    flag("--dpm_solver", action="store_true", help="use DPM-Solver++ (2M) sampling")
    if not image:
        flag("--laion400m", action="store_true", help="uses the LAION400M model")
    flag("--fixed_code", action="store_true", help="use the same starting codes, and seeds, in every iteration")
    flag("--ddim_eta", type=float, default=0.0, help="ddim eta (eta=0.0 corresponds to deterministic sampling)")
    flag("--n_iter", type=int, default=n_iter, help="sample this often")
    flag("--H", type=int, help="height in pixels (default: the image's or model's; 512 for SD v1)")
    flag("--W", type=int, help="width in pixels (default: the image's or model's; 512 for SD v1)")
    flag("--C", type=int, help="latent channels (default: the model's; 4 for SD v1)")
    flag("--f", type=int, help="downsampling factor (default: the model's; 8 for SD v1)")
    flag("--n_samples", type=int, default=n_samples, help="samples for each prompt, a.k.a. batch size")
    flag("--n_rows", type=int, default=0, help="pictures in a row of the grid (0: n_samples)")
    flag("--scale", type=float, default=scale,
         help="guidance scale: eps = eps(x, empty) + scale * (eps(x, cond) - eps(x, empty))")  # fmt: skip
    if image:
        flag("--strength", type=float, default=0.75, help="noising in (0, 1]; 1.0 keeps nothing of the image")
    flag("--from-file", help="if specified, load prompts from this file, one a line")
    flag("--config", default=SD_CONFIG, help="path to config which constructs model")
    flag("--ckpt", default=SD_CKPT, help="path to checkpoint of model")
    flag("--seed", type=int, default=42, help="seed of the first picture; the next ones count on from it")
    flag("--precision", choices=["full", "autocast"], default="autocast",
         help="autocast is half precision on CUDA and full precision elsewhere")  # fmt: skip
    add_new_flags(parser)
    return parser


def add_new_flags(parser: cli.ArgumentParser) -> None:
    """What the original scripts do not have."""
    flag = parser.add_argument_group("beyond the original scripts").add_argument
    flag("--adapter_path", help="directory of adapters to put into the model")
    flag(
        "--adapter_scale",
        type=float,
        default=1.0,
        help="strength of the adapters; 0 is the model without them",
    )
    flag("--embedding_path", help="embedding of a textual inversion")
    flag(
        "--negative_prompt",
        default="",
        help="what the pictures should not show, in place of the empty prompt",
    )
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--no_safety_checker", action="store_true", help="show Stable Diffusion's pictures unchecked")
    flag("--safety_checker", help="folder or hub name of the safety checker's weights")
    flag("--no_watermark", action="store_true", help="no invisible watermark in Stable Diffusion's pictures")
    flag("--allow_pickle", action="store_true",
         help="unpickle a .ckpt that imports other things than weights: it may run any code")  # fmt: skip


# ---- checks, from cheap to dear ----------------------------------------------------------------------------


def check_flags(options: argparse.Namespace, default_sampler: str = "ddim") -> None:
    """Raise UserError for flag values that cannot be; sets `options.sampler`."""
    if getattr(options, "laion400m", False):
        raise UserError("--laion400m: that model is not supported yet; use --config and --ckpt of another")
    if options.embedding_path:
        raise UserError("--embedding_path: textual inversion is not supported yet; leave it out")
    if options.plms and options.dpm_solver:
        raise UserError("--plms and --dpm_solver exclude each other; give one")
    options.sampler = "plms" if options.plms else "dpm_solver" if options.dpm_solver else default_sampler
    for name in ("n_samples", "n_iter", "ddim_steps", "H", "W", "C", "f"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if options.n_rows < 0:
        raise UserError(f"--n_rows {options.n_rows}: must be 0 or more")
    if not 0.0 <= options.ddim_eta <= 1.0:
        raise UserError(f"--ddim_eta {options.ddim_eta:g}: must be between 0 and 1")
    if options.ddim_eta and options.sampler != "ddim":
        raise UserError(f"--ddim_eta {options.ddim_eta:g}: only DDIM sampling has it; leave --{options.sampler} out")
    if not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--seed {options.seed}: must be between 0 and {MAX_SEED}")
    for name in ("prompt", "outdir"):
        if not getattr(options, name):
            raise UserError(f"--{name}: needs a value")
    if options.no_safety_checker and options.safety_checker:
        raise UserError("--safety_checker and --no_safety_checker exclude each other; give one")


def check_paths(options: argparse.Namespace, program: str) -> None:
    """Raise UserError when a named file or directory is not there; needs no torch."""
    if not Path(options.config).is_file():
        raise UserError(f"--config: there is no file '{options.config}'")
    if not Path(options.ckpt).exists():
        if options.ckpt == SD_CKPT:
            raise UserError(
                "--ckpt: Stable Diffusion v1's weights are not here; "
                f"put them (e.g. sd-v1-4.ckpt) at {SD_CKPT}, "
                f"or use the small model that comes along: {tiny_command(options, program)}"
            )
        raise UserError(f"--ckpt: there is no file '{options.ckpt}'")
    if options.from_file and not Path(options.from_file).is_file():
        raise UserError(f"--from-file: there is no file '{options.from_file}'")
    if options.adapter_path and not Path(options.adapter_path).is_dir():
        raise UserError(f"--adapter_path: there is no directory '{options.adapter_path}'")
    parent = Path(options.outdir)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--outdir: cannot write to '{options.outdir}': '{parent}' is no directory to write to")


def tiny_command(options: argparse.Namespace, program: str) -> str:
    """The same command with the model that the repository carries."""
    words = ["python", program]
    if options.plms or options.dpm_solver:
        words.append(f"--{options.sampler}")
    if hasattr(options, "init_img"):
        words.append(f"--init-img {options.init_img or 'IMAGE'}")
    return " ".join([*words, '--prompt "a large red circle on a white background"', TINY])


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of one iteration: `--prompt` n_samples times, or the lines of `--from-file`."""
    if not options.from_file:
        return [options.prompt] * options.n_samples
    try:
        lines = Path(options.from_file).read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--from-file: '{options.from_file}' cannot be read as text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from-file: '{options.from_file}' holds no prompts")
    return prompts


def read_image(path: str | None) -> Any:
    """The image of `--init-img`, decoded.

    Raises:
        UserError: it is missing, no image, or damaged.
    """
    from PIL import Image

    if not path:
        raise UserError("--init-img: needs the path of an image")
    if not Path(path).is_file():
        raise UserError(f"--init-img: there is no file '{path}'")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except Exception as error:  # Pillow raises many types for damaged files
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"--init-img: '{path}' cannot be read as an image: {reason}") from error


# ---- the way through ---------------------------------------------------------------------------------------


def sample(options: argparse.Namespace, program: str, default_sampler: str = "ddim") -> None:
    """Check everything, load the model, draw, and write files; `options` come from `sampling_parser`.

    Raises:
        UserError: a flag, file or setting is wrong; flags are looked at first, the model is built last.
    """
    check_flags(options, default_sampler)
    is_image = hasattr(options, "init_img")
    if is_image and not 0.0 < options.strength <= 1.0:
        raise UserError(f"--strength {options.strength:g}: must be above 0 and at most 1")
    check_paths(options, program)
    image = read_image(options.init_img) if is_image else None
    prompts = read_prompts(options)

    from ldm import checkpoint, loading
    from ldm.safety import Protection
    from ldm.util import load_yaml, pick_device

    config = load_yaml(options.config)
    device = pick_device(options.device)
    checkpoint.check_file(options.ckpt, options.allow_pickle)
    model = loading.build_model(config)
    check_against_model(options, model)
    check_adapters(options, config)
    checker = False if options.no_safety_checker else (options.safety_checker or True)
    protection = Protection.of(model, config, checker, watermark=not options.no_watermark)
    model = loading.load_model(
        config,
        options.ckpt,
        device,
        adapter_path=options.adapter_path,
        adapter_scale=options.adapter_scale,
        allow_pickle=options.allow_pickle,
        model=model,
    )
    draw_and_save(options, model, protection, prompts, image)


def check_adapters(options: argparse.Namespace, config: Any) -> None:
    """Raise UserError when --adapter_path is no adapter directory, or nothing says what its files are."""
    from ldm.loading import adapter_config_of
    from ldm.modules.adapter_files import MANIFEST, read_manifest

    if options.adapter_path and read_manifest(options.adapter_path) is None and not adapter_config_of(config):
        raise UserError(
            f"--adapter_path: '{options.adapter_path}' has no {MANIFEST}, so --config must be the yaml that "
            "the adapters were trained with (one with adapter_config)"
        )


def check_against_model(options: argparse.Namespace, model: Any) -> None:
    """Raise UserError when --H, --W, --C, --f or --ddim_steps do not go with the model."""
    from ldm.loading import Geometry

    geometry = Geometry.of(model)
    for name, value in (("C", geometry.channels), ("f", geometry.factor)):
        given = getattr(options, name)
        if given not in (None, value):
            raise UserError(f"--{name} {given}: this model has {value}; leave the flag out")
    geometry.check(options.H or geometry.height, options.W or geometry.width)
    if options.ddim_steps > model.num_timesteps:
        raise UserError(f"--ddim_steps {options.ddim_steps}: this model has {model.num_timesteps} timesteps")


def draw_and_save(
    options: argparse.Namespace, model: Any, protection: Any, prompts: Sequence[str], image: Any = None
) -> list[Picture]:
    """All iterations, batch by batch; every batch is on disk before the next one begins."""
    from ldm import inference, outputs
    from ldm.watermark import fits

    folder = outputs.OutputFolder(Path(options.outdir))
    settings = {
        "steps": options.ddim_steps,
        "sampler": options.sampler,
        "scale": options.scale,
        "eta": options.ddim_eta,
        "negative_prompt": options.negative_prompt,
        "precision": options.precision,
        "batch_size": options.n_samples,
        "protection": protection,
        "height": options.H,
        "width": options.W,
    }
    if image is not None:
        settings["strength"] = options.strength
    done: list[Picture] = []
    for iteration in range(options.n_iter):
        for first in range(0, len(prompts), options.n_samples):
            batch = prompts[first : first + options.n_samples]
            start = options.seed + (0 if options.fixed_code else iteration * len(prompts) + first)
            print(f"Pictures {len(done) + 1}-{len(done) + len(batch)} of {len(prompts) * options.n_iter}")
            if image is None:
                pictures = inference.text_to_image(model, batch, seed=start, **settings)
            else:
                pictures = inference.image_to_image(model, image, batch, seed=start, **settings)
            report_protection(pictures, protection, first_batch=not done, fits=fits)
            if not options.skip_save:
                for picture in pictures:
                    folder.save(picture)
            done += pictures
    if not options.skip_grid:
        folder.save_grid(done, options.n_rows or options.n_samples, protection.mark)
    print(f"Your samples are ready and waiting for you here: {options.outdir}")
    return done


def report_protection(pictures: Sequence[Picture], protection: Any, first_batch: bool, fits: Any) -> None:
    """Say which pictures were blocked, and once that pictures are too small for the watermark."""
    for picture in pictures:
        if picture.blocked:
            print(f"The safety checker blocked the picture of seed {picture.settings.seed}; it is black.")
    if first_batch and protection.watermark and not fits(pictures[0].image):
        print("These pictures are too small for the watermark (it needs 256x256); they carry none.")
