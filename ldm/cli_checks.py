"""What the drawing command lines check before anything heavy is loaded: flags first, then the files they name."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.hub import is_hub_name
from ldm.samplers import CHURN, check_choice

SD_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
SD_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
TINY = "--config models/tiny/config.yaml --ckpt models/tiny/model.safetensors"
# What --laion400m stands for, as in the original: the text-to-image model before Stable Diffusion.
LAION = {
    "config": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ckpt": "models/ldm/text2img-large/model.ckpt",
    "outdir": "outputs/txt2img-samples-laion400m",
}
TXT2IMG_OUTDIR = "outputs/txt2img-samples"
MAX_SEED = 2**32 - 1
SOLVER_FLAGS = ("algorithm", "order", "method", "spacing", "thresholding")  # --dpm_...
NOISE_FLAGS = ("rho", *CHURN)


def check_flags(options: argparse.Namespace, default_sampler: str = "ddim") -> None:
    """Raise UserError for flag values that cannot be; it sets `options.sampler`, `options.solver`,
    `options.sampler_flags` and what --laion400m stands for."""
    if getattr(options, "laion400m", False):
        usual = {"config": SD_CONFIG, "ckpt": SD_CKPT, "outdir": TXT2IMG_OUTDIR}
        vars(options).update({name: value for name, value in LAION.items() if getattr(options, name) == usual[name]})
    _check_sampler(options, default_sampler)
    for name in ("n_samples", "n_iter", "ddim_steps", "H", "W", "C", "f", "clip_skip"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if options.n_rows < 0:
        raise UserError(f"--n_rows {options.n_rows}: must be 0 or more")
    check_seed_and_checker(options)
    strength = getattr(options, "strength", 1.0)
    if not 0.0 < strength <= 1.0:
        raise UserError(f"--strength {strength:g}: must be above 0 and at most 1")
    for name in ("prompt", "outdir"):
        if not getattr(options, name):
            raise UserError(f"--{name}: needs a value")


def check_seed_and_checker(options: argparse.Namespace) -> None:
    """Raise UserError for a --seed out of range, or for both flags of the safety checker."""
    if not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--seed {options.seed}: must be between 0 and {MAX_SEED}")
    if options.no_safety_checker and options.safety_checker:
        raise UserError("--safety_checker and --no_safety_checker exclude each other; give one")


def _check_sampler(options: argparse.Namespace, default_sampler: str) -> None:
    short = [name for name in ("plms", "dpm_solver") if getattr(options, name)]
    named = [f"--{name}" for name in short] + ([f"--sampler {options.sampler}"] if options.sampler else [])
    options.sampler_flags = named
    if len({*short, *([options.sampler] if options.sampler else [])}) > 1:
        raise UserError(f"{' and '.join(named)} exclude each other; give one")
    options.sampler = options.sampler or next(iter(short), default_sampler)
    if not 0.0 <= options.ddim_eta <= 1.0:
        raise UserError(f"--ddim_eta {options.ddim_eta:g}: must be between 0 and 1")
    if options.ddim_eta and options.sampler != "ddim":
        raise UserError(f"--ddim_eta {options.ddim_eta:g}: only DDIM sampling has it; leave {' '.join(named)} out")
    if options.eta is not None and options.sampler == "ddim":
        raise UserError(f"--eta {options.eta:g}: DDIM's noise is --ddim_eta; give that, or name another --sampler")
    solver = {key: value for key in SOLVER_FLAGS if (value := getattr(options, f"dpm_{key}")) is not None}
    if solver and options.sampler != "dpm_solver":
        raise UserError(f"--dpm_{next(iter(solver))}: is a setting of --dpm_solver; give that too")
    noise = {key: value for key in NOISE_FLAGS if (value := getattr(options, key)) is not None}
    options.solver = solver | noise
    check_choice(options.sampler, options.schedule, options.eta, options.solver, lambda name: f"--{name}")


def check_paths(options: argparse.Namespace, program: str) -> None:
    """Raise UserError when a named file or directory is not there; needs no torch."""
    if options.config != SD_CONFIG and not Path(options.config).is_file():
        raise UserError(f"--config: there is no file '{options.config}'")
    if not Path(options.ckpt).exists():
        if options.ckpt == SD_CKPT:
            raise UserError(
                "--ckpt: Stable Diffusion v1's weights are not here; "
                f"put them (e.g. sd-v1-4.ckpt) at {SD_CKPT}, "
                f"or use the small model that comes along: {tiny_command(options, program)}"
            )
        if not is_hub_name(options.ckpt):
            raise UserError(f"--ckpt: there is no file '{options.ckpt}'")
    if options.vae and not Path(options.vae).exists() and not is_hub_name(options.vae):
        raise UserError(f"--vae: there is no file '{options.vae}'")
    if options.from_file and not Path(options.from_file).is_file():
        raise UserError(f"--from-file: there is no file '{options.from_file}'")
    if options.adapter_path and not Path(options.adapter_path).is_dir():
        raise UserError(f"--adapter_path: there is no directory '{options.adapter_path}'")
    read_artefacts(options)
    parent = Path(options.outdir)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--outdir: cannot write to '{options.outdir}': '{parent}' is no directory to write to")


def read_artefacts(options: argparse.Namespace) -> dict[str, float]:
    """What --adapter, --lora and --embedding_path name, and the strength of each.

    Raises:
        UserError: there is no such file or directory, or a strength is no finite number.
    """
    found: dict[str, float] = {}
    for flag in ("adapter", "lora", "embedding_path"):
        words = getattr(options, flag, None)
        found |= read_strengths([words] if isinstance(words, str) else words, f"--{flag}")
    return found


def read_strengths(words: Sequence[str] | None, flag: str = "--lora") -> dict[str, float]:
    """Paths and their strengths, from PATH or PATH:STRENGTH.

    Raises:
        UserError: there is no such file or directory, or a strength is no finite number.
    """
    found = {}
    for word in words or ():
        path, _, strength = word.rpartition(":")
        try:
            value = float(strength)
        except ValueError:
            path, value = word, 1.0
        if not path or not Path(path).exists():
            raise UserError(f"{flag}: there is no file or directory '{path or word}'")
        if not math.isfinite(value):
            raise UserError(f"{flag} {word}: the strength must be a number such as 0.8")
        found[path] = value
    return found


def tiny_command(options: argparse.Namespace, program: str) -> str:
    """The same command with the model that the repository carries."""
    words = ["python", program]
    words += options.sampler_flags
    if options.schedule:
        words.append(f"--schedule {options.schedule}")
    if hasattr(options, "init_img"):
        words.append(f"--init-img {options.init_img or 'IMAGE'}")
    if hasattr(options, "mask"):
        words.append(f"--mask {options.mask or 'MASK'}")
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


def read_image(path: str | None, flag: str = "--init-img") -> Any:
    """The image that a flag names, decoded.

    Raises:
        UserError: it is missing, no image, or damaged.
    """
    from PIL import Image

    if not path:
        raise UserError(f"{flag}: needs the path of an image")
    if not Path(path).is_file():
        raise UserError(f"{flag}: there is no file '{path}'")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except Exception as error:  # Pillow raises many types for damaged files
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{flag}: '{path}' cannot be read as an image: {reason}") from error
