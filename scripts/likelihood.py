"""The log-likelihood of a folder's images under a diffusion model, with the error of each: no bound, an estimate.

python scripts/likelihood.py -r logs/2026-01-01T10-00-00_digits --images digits

Pixels' likelihoods are bits of the bytes (uniform dequantisation); a latent model's are of the density of its latents,
which compare only between models of one autoencoder.
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

BYTE = 2 / 255  # between two neighbouring values of a pixel in [-1, 1]
COLUMNS = ("image", "nats", "nats_error", "bits_per_dim", "bits_per_dim_error")


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Print the log-likelihood of a folder's images under a diffusion model.")
    flag = parser.add_argument
    flag("-r", "--resume", required=True, help="a folder with model.ckpt and config.yaml, a run's, or a checkpoint")
    flag("--config", help="the model's yaml (default: that beside the checkpoint, or the run's)")
    flag("--images", required=True, help="folder of images; they are cropped and resized to the model's size")
    flag("--n_images", type=int, help="only the first so many, by name (default: all)")
    flag("--probes", type=int, default=4, help="random directions an image, by which the error is known: at least 2")
    flag("--batch_size", type=int, default=8, help="images at a time")
    flag("--sigma_min", type=float, help="the noise in which the images are taken to lie (default: the model's)")
    flag("--sigma_max", type=float, help="the noise in which all is lost (default: the model's)")
    flag("--tolerance", type=float, default=1e-4, help="of the ODE's solver, absolute and relative")
    flag("--caption", default="", help="of all images, for a model that is led by text")
    flag("--class", dest="label", type=int, help="of all images, for a model that is led by a class's number")
    flag("--seed", type=int, default=0, help="of the probes and the dequantisation; image i has seed + i")
    flag("--csv", help="file for the table")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--allow_pickle", action="store_true",
         help="unpickle a .ckpt that imports other things than weights: it may run any code")  # fmt: skip
    flag("overrides", nargs="*", help="key.subkey=value, over the yaml")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and folders that cannot be."""
    for name, least in (("n_images", 1), ("probes", 2), ("batch_size", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    for name in ("sigma_min", "sigma_max"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g}: must be a number above 0")
    if not 1e-9 <= options.tolerance < 1:
        raise UserError(f"--tolerance {options.tolerance:g}: must lie between 1e-9 and 1")
    if not Path(options.images).is_dir():
        raise UserError(f"--images: there is no folder '{options.images}'")
    if options.csv and not Path(options.csv).absolute().parent.is_dir():
        raise UserError(f"--csv: there is no folder '{Path(options.csv).absolute().parent}'")


def levels_of(options: argparse.Namespace, model: Any) -> tuple[float, float]:
    """The lowest and the highest noise level.

    Raises:
        UserError: they cannot be.
    """
    low = model.sigma_min if options.sigma_min is None else options.sigma_min
    high = model.sigma_max if options.sigma_max is None else options.sigma_max
    if not 0 < low < high:
        raise UserError(f"--sigma_min {low:g} and --sigma_max {high:g}: needs 0 < sigma_min < sigma_max")
    return low, high


def rows_of(options: argparse.Namespace, model: Any, images: Any) -> Iterator[dict[str, Any]]:
    """A row of `COLUMNS` an image; `model` is a `LoadedModel`, `images` an `ImageFolder`."""
    import torch
    from tqdm import tqdm

    from ldm.k_diffusion.likelihood import bits_per_dim, estimate, rademacher
    from ldm.models.diffusion.trainer import noises

    levels, count = levels_of(options, model), min(len(images), options.n_images or len(images))
    width = 1.0 if model.of_latents else BYTE
    with tqdm(total=count, unit="image", desc="Likelihoods") as bar:
        for first in range(0, count, options.batch_size):
            places = range(first, min(first + options.batch_size, count))
            batch = torch.stack([torch.from_numpy(images[place]).permute(2, 0, 1) for place in places])
            x = model.encode(batch.to(model.model.device))
            generators = noises(options.seed + first, len(x))
            if not model.of_latents:
                spread = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]) - 0.5
                x = x + BYTE * spread.to(x)
            condition = model.condition(len(x), options.caption, options.label)
            probes = rademacher(x, options.probes, generators)
            found = estimate(model, x, *levels, probes, condition, options.tolerance, options.tolerance)
            bits = bits_per_dim(found.nats, x[0].numel(), width)
            errors = bits_per_dim(-found.error, x[0].numel())
            for i, place in enumerate(places):
                numbers = (float(values[i]) for values in (found.nats, found.error, bits, errors))
                yield dict(zip(COLUMNS, (images.paths[place].name, *numbers), strict=True))
            bar.update(len(x))


def summary(rows: Sequence[dict[str, Any]], model: Any) -> str:
    """The mean over images, with the error that their number and the probes leave."""
    from statistics import mean, stdev

    bits = [row["bits_per_dim"] for row in rows]
    spread = f" +- {stdev(bits) / len(bits) ** 0.5:.4f} over images" if len(bits) > 1 else ""
    probed = sum(row["bits_per_dim_error"] ** 2 for row in rows) ** 0.5 / len(rows)
    what = "of the latents' density" if model.of_latents else "of bytes"
    return f"{len(rows)} images: {mean(bits):.4f} bits/dim {what}{spread} (+- {probed:.4f} by the probes)"


def main(argv: Sequence[str]) -> None:
    """Parse the flags, load the model, print a line an image and the mean."""
    options = parser().parse_args(argv)
    check(options)
    from ldm.cli_unprompted import find_source

    source = find_source(options)

    from tqdm import tqdm

    from ldm import checkpoint, loading
    from ldm.data.base import ImageFolder, list_images
    from ldm.k_diffusion.loaded import LoadedModel
    from ldm.util import load_yaml, pick_device

    list_images(options.images)
    device = pick_device(options.device)
    config = load_yaml(*source.configs, overrides=options.overrides)
    checkpoint.check_file(source.ckpt, options.allow_pickle)
    model = LoadedModel(loading.load_model(config, source.ckpt, device, allow_pickle=options.allow_pickle))
    levels_of(options, model)
    if model.size[0] != model.size[1]:
        raise UserError(f"yaml: image_size: {model.size[1]}x{model.size[0]}: images are square here")
    rows = []
    print("  ".join(COLUMNS))
    for row in rows_of(options, model, ImageFolder(options.images, model.size[0])):
        rows.append(row)
        tqdm.write("{}  {:.2f}  {:.2f}  {:.4f}  {:.4f}".format(*row.values()))
    if options.csv:
        write(rows, Path(options.csv))
    print(summary(rows, model))


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The table as a file."""
    import csv

    from ldm.util import atomic_path

    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    cli.run(main)
