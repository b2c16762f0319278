"""Draw many pictures, to measure a model by or to train on: over all devices, and going on where it was stopped.

python scripts/generate.py --prompts captions.txt --count 50000 --outdir outputs/generated --dpm_solver --ddim_steps 20
python scripts/generate.py --prompts labels.txt --template "a photo of a {}" --count 50000      class labels, by turns
torchrun --nproc_per_node 8 scripts/generate.py --prompts captions.txt                      the same, by torchrun
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli, cli_sampling
from ldm.cli_checks import MAX_SEED, SD_CKPT, SD_CONFIG, check_flags, check_paths, read_artefacts
from ldm.errors import UserError

# What the drawing programs' checks look at and this one has no flag for.
NOT_HERE = dict(prompt="-", from_file=None, embedding_path=None, n_iter=1, n_rows=0, C=None, f=None)
# What pictures depend on; files are told by their contents.
MADE_BY = ("sampler", "schedule", "solver", "ddim_steps", "ddim_eta", "eta", "scale", "negative_prompt",
           "prompt_weighting", "clip_skip", "H", "W", "precision", "adapter_scale", "no_safety_checker",
           "no_watermark")  # fmt: skip
FILES = ("ckpt", "config", "vae", "adapter_path")


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(
        description="Draw many pictures, over all devices. Picture i has the seed --seed + i and lies in "
        "OUTDIR/00000/000000.png and so on; started again, it draws what is lacking. OUTDIR/manifest.jsonl has file, "
        "prompt and seed of each."
    )
    flag = parser.add_argument
    flag("--prompts", help="a text file, one prompt a line; a table (.jsonl, .csv, .tsv); a folder of captioned "
         "images; or a yaml, for the captions of its data.params.train")  # fmt: skip
    flag("--template", help="put every line (a class label) in place of {}, e.g. 'a photo of a {}'")
    flag("--column", help="the table's column with prompts (default: prompt, caption or text)")
    flag("--count", type=int, help="pictures in all; prompts are taken by turns (default: one a prompt)")
    flag("--outdir", default="outputs/generated", help="where pictures go")
    flag("--seed", type=int, default=42, help="seed of the first picture; the next ones count on from it")
    flag("--batch_size", type=int, default=16, help="pictures at a time, of each process")
    flag("--exact", action="store_true",
         help="draw the pictures of a batch one by one: the same to the bit for every --batch_size, but slower on a "
         "GPU")  # fmt: skip
    flag("--processes", type=int, help="processes on this machine (default: one a CUDA device); torchrun sets its own")
    flag("--ddim_steps", type=int, default=50, help="number of sampling steps, whatever the sampler")
    flag("--plms", action="store_true", help="use plms sampling, not ddim")
    flag("--dpm_solver", action="store_true", help="use DPM-Solver++ (2M) sampling, not ddim")
    cli_sampling.add_sampler_flags(flag)
    flag("--ddim_eta", type=float, default=0.0, help="noise of ddim's steps, 0 to 1")
    flag("--scale", type=float, default=7.5, help="guidance scale; 1 for none")
    flag("--negative_prompt", default="", help="what the pictures should not show")
    flag("--prompt_weighting", action="store_true", help="read (word:1.2), (word) and [word] as weights of words")
    flag("--clip_skip", type=int, help="stop the text encoder at its last layer but CLIP_SKIP - 1")
    flag("--H", type=int, help="height in pixels (default: the model's)")
    flag("--W", type=int, help="width in pixels (default: the model's)")
    flag("--config", default=SD_CONFIG, help="yaml of the model; when not given, the checkpoint's own comes first")
    flag("--ckpt", default=SD_CKPT, help="its weights: a file, a diffusers folder, or a model hub's owner/name")
    flag("--vae", help="another autoencoder's weights")
    flag("--adapter_path", help="directory of adapters to put into the model")
    flag("--adapter_scale", type=float, default=1.0, help="strength of the adapters")
    cli_sampling.add_artefact_flags(flag)
    cli_sampling.add_compile_flag(flag)
    cli_sampling.add_model_flags(flag)
    cli_sampling.add_solver_flags(parser)
    parser.set_defaults(**NOT_HERE)
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags and files that cannot be; needs no torch."""
    options.n_samples, options.batched = options.batch_size, not options.exact
    for name in ("count", "batch_size", "processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not options.prompts:
        raise UserError("--prompts: name a text file, a table, a folder of captioned images or a yaml")
    if options.template is not None and options.template.count("{}") != 1:
        raise UserError(f"--template '{options.template}': must hold one {{}} for the label")
    check_flags(options)
    if not Path(options.prompts).exists():
        raise UserError(f"--prompts: there is no file '{options.prompts}'")
    check_paths(options, "scripts/txt2img.py")


def plan_of(options: argparse.Namespace) -> Any:
    """The pictures that the flags ask for, compared with what is in the folder."""
    from ldm import generation

    prompts = generation.read_prompts(options.prompts, options.column, options.template)
    plan = generation.Plan(Path(options.outdir), prompts, options.seed, options.count or len(prompts))
    if options.seed + plan.count - 1 > MAX_SEED:
        raise UserError(f"--seed {options.seed}: the last picture's would be above {MAX_SEED}")
    made_by = {name: getattr(options, name) for name in MADE_BY}
    for name in FILES:
        value = getattr(options, name)
        made_by[name] = generation.fingerprint(value) if value and Path(value).exists() else value
    added = read_artefacts(options)
    made_by["lora"] = [[generation.fingerprint(path), strength] for path, strength in added.items()] or None
    plan.agree(made_by)
    return plan


def draw(options: argparse.Namespace, place: Any, shown: bool) -> None:
    """Draw one process' share."""
    from ldm import generation, inference

    plan = plan_of(options)
    if place.world == 1:
        plan.clean()
    if options.device in ("auto", "cuda") and place.world > 1:
        import torch

        if torch.cuda.is_available():
            options.device = f"cuda:{place.local % torch.cuda.device_count()}"
    with cli_sampling.one_line_warnings():
        model, protection = cli_sampling.load(options, {})
        settings = cli_sampling.drawing_settings(options, protection)

        def draw_batch(prompts: list[str], seeds: list[int]) -> Any:
            return inference.txt2img(model, prompts, seeds=seeds, progress=False, **settings)

        blocked = generation.draw_share(plan, place, draw_batch, options.batch_size, options.exact, shown)
    if blocked:
        print(f"The safety checker blocked {blocked} pictures; they are black.")


def start_processes(options: argparse.Namespace, argv: Sequence[str], count: int) -> None:
    """Run this program `count` times, each for its share, under one bar; all end when one fails."""
    from ldm import generation

    plan = plan_of(options)
    plan.clean()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    common = {**os.environ, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": threads, "GENERATE_PARENT": str(os.getpid())}
    progress = generation.Progress(plan, shown=True)
    with tempfile.TemporaryFile("w+") as said:
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *argv],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            for rank in range(count)
        ]
        try:
            while any(worker.poll() is None for worker in workers) and not any(w.returncode for w in workers):
                time.sleep(0.2)
                progress.look()
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
            progress.look(last=True)
        failed = [worker.returncode for worker in workers if worker.returncode]
        said.seek(0)
        lines = [line.rstrip() for line in said if line.strip()]
    if failed:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
        raise UserError(next(iter(errors), f"a process ended with exit code {failed[0]}"))
    print(
        "\n".join(dict.fromkeys(line for line in lines if line.startswith(("warning", "The safety checker")))), end=""
    )


def main(argv: Sequence[str]) -> None:
    """Draw what is lacking, in this process or in several."""
    options = parser().parse_args(argv)
    check(options)
    from ldm.generation import Place

    place, count = Place.here(), options.processes
    if place is None and count is None:
        import torch

        count = torch.cuda.device_count() if options.device in ("auto", "cuda") else 1
    if place is None and (count or 1) > 1:
        start_processes(options, argv, count)
    else:
        place = place or Place()
        draw(options, place, shown=place.rank == 0 and "GENERATE_PARENT" not in os.environ)
    if place is None or place.rank == 0:
        print(f"Your samples are ready and waiting for you here: {options.outdir}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the manifest is written first
    cli.run(main)
