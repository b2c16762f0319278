"""Teach the shipped tiny model a new subject from five photos, and draw it before and after.

python scripts/demo.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = 5


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Teach the tiny model a new subject; draw it before and after.")
    flag = parser.add_argument
    flag("--subject", default="ball", help="ball, flower or house")
    flag("--steps", type=int, default=240, help="training steps")
    flag(
        "--prior_images",
        type=int,
        default=96,
        help="of the class, of other scenes and of no prompt, made by the model itself",
    )
    flag("--others", type=int, default=40, help="unrelated prompts that measure what tuning should not change")
    flag("--sampling_steps", type=int, default=20, help="steps a picture")
    flag("--seed", type=int, default=0, help="seed of the photos, the training and the pictures")
    flag("--base", default="configs/tiny/dreambooth.yaml", help="yaml of the training")
    flag("--config", default="models/tiny/config.yaml", help="yaml of the model")
    flag("--ckpt", default="models/tiny/model.safetensors", help="its weights")
    flag("--outdir", default="outputs/demo", help="where everything is written")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers and files that cannot be."""
    for name in ("steps", "prior_images", "others", "sampling_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    for name in ("base", "config", "ckpt"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name}: there is no file '{getattr(options, name)}'")


def train(options: argparse.Namespace, photos: Path, prior: Path) -> Path:
    """Run main_dream_booth.py as a person would, and return the directory of the trained adapters."""
    from ldm.data.subjects import CLASS_WORD

    logs = Path(options.outdir) / "logs"
    known = set(logs.glob("*"))
    words = [
        "main_dream_booth.py", "--base", options.base,
        f"model.params.scheduler_config.params.max_decay_steps={options.steps}",
        "-t", "--actual_resume", options.ckpt, "-n", "demo", "--data_root", photos, "--reg_data_root", prior,
        "--class_word", CLASS_WORD, "--scale_lr", "False", "--max_steps", options.steps,
        "--seed", options.seed, "--logdir", logs,
    ]  # fmt: skip
    words = [str(word) for word in words]
    print(f"\n$ python {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    if subprocess.run(command).returncode:
        raise UserError("demo: the training did not end well; its messages are above")
    (run,) = set(logs.glob("*")) - known
    return run / "checkpoints" / f"{options.steps}-adapters"


def demonstrate(options: argparse.Namespace) -> None:
    """Photos, prior images, training, pictures, numbers."""
    from PIL import Image

    from ldm.data.subjects import CLASS_WORD, write_subject_photos
    from ldm.evaluation import personalization as people
    from ldm.inference import load_model
    from ldm.modules import adapters
    from ldm.modules.pictures import save_picture

    start = time.perf_counter()
    outdir = Path(options.outdir)
    prior_prompts = people.prior_prompts(CLASS_WORD, options.prior_images)
    prompts = {"subject": people.subject_prompts(CLASS_WORD, 20), "others": people.other_prompts(options.others)}
    people.check_apart(prior_prompts, prompts["others"])
    sampling = people.Sampling(steps=options.sampling_steps)
    folder, prior = outdir / "photos" / options.subject, outdir / "prior"
    paths = write_subject_photos(folder, options.subject, PHOTOS, options.seed)
    print(f"{PHOTOS} photos of a new subject, 'sks {CLASS_WORD}': {folder}")
    model = load_model(options.config, options.ckpt, "cpu")
    print(f"{options.prior_images} prior images, drawn by the model as it is: {prior}")
    people.write_prior_images(model, prior_prompts, prior, options.seed + 1000, sampling)

    before_training = time.perf_counter()
    adapter_path = train(options, folder, prior)
    training = time.perf_counter() - before_training

    print("\nThe same prompts and seeds without and with the adapters", flush=True)
    before = people.Pictures.of(model, **prompts, seed=options.seed, sampling=sampling)
    unet = model.model.diffusion_model
    whole = sum(p.numel() for p in unet.parameters())
    unet.load_adapter_from_dir(adapter_path)
    after = people.Pictures.of(model, **prompts, seed=options.seed, sampling=sampling)
    trained = sum(p.numel() for p in adapters.adapter_parameters(unet))

    photos = [Image.open(path).convert("RGB") for path in paths]
    numbers = people.compare(photos, before, after, **prompts)
    seconds = time.perf_counter() - start
    report = [
        ("subject similarity", f"{numbers['similarity_before']:.2f} before, {numbers['similarity_after']:.2f} after "
                               f"(photo to photo: {numbers['similarity_photos']:.2f})"),
        ("unrelated prompts", f"{numbers['accuracy_before']:.0%} drawn right before, "
                              f"{numbers['accuracy_after']:.0%} after"),
        ("drift of their pixels", f"{numbers['pixel_change']:.1%} of the range"),
        ("parameters trained", f"{trained:,}, {trained / whole:.2%} of the U-Net's {whole:,}"),
        ("time", f"{seconds:.0f} s, of which training {training:.0f} s"),
    ]  # fmt: skip
    picture = outdir / "demo.png"
    title = f"A new subject from {PHOTOS} photos, by training {trained / whole:.1%} of the U-Net"
    notes = [f"{name}: {text}" for name, text in report]
    save_picture(people.comparison_sheet(photos, before, after, **prompts, title=title, notes=notes), picture)
    where = [("adapters", adapter_path), ("photos, prior images", f"{folder}, {prior}"), ("picture", picture)]
    print("\n" + "\n".join(f"{name:<22} {text}" for name, text in [*report, *where]))
    print(f"\nTo go on in the browser: python scripts/webui.py --adapters {adapter_path}")


def main(argv: Sequence[str]) -> None:
    """Parse the flags and demonstrate."""
    options = parser().parse_args(argv)
    check(options)
    demonstrate(options)


if __name__ == "__main__":
    cli.run(main)
