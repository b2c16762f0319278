"""Loading a model: time and peak memory, side by side with diffusers' from_pretrained on the same random weights.

python benchmarks/loading.py            # Stable Diffusion v1's size: 13 GB of disk, a few minutes
python benchmarks/loading.py --small    # a small model, to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli

ROOT = Path(__file__).resolve().parents[1]
PEER = "diffusers' from_pretrained"
SIDES = {PEER: "pipeline", "here, that folder": "pipeline", "here, .safetensors": "model.safetensors",
         "here, .ckpt": "model.ckpt"}  # fmt: skip
YAML = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
# What differs in the small model's yaml.
SMALL = {
    "unet_config.params.model_channels": 32,
    "unet_config.params.context_dim": 32,
    "first_stage_config.params.ddconfig.ch": 32,
    "cond_stage_config.params": {
        "architecture": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
    },
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Time and peak memory of loading a model, beside diffusers.")
    parser.add_argument("--small", action="store_true", help="a small model, for a quick run")
    parser.add_argument("--half", action="store_true", help="fp16 weights in the files, loaded as fp32")
    parser.add_argument("--runs", type=int, help="processes for each side (default: 5, with --small 2)")
    parser.add_argument("--folder", help="where the models are written, and kept (default: a temporary folder)")
    parser.add_argument("--measure", choices=list(SIDES), help="only this side, in this process, as JSON")
    return parser


def write_models(folder: Path, small: bool, half: bool) -> None:
    """A random model in `folder`: model.yaml, model.safetensors, model.ckpt and the folder pipeline/."""
    import torch
    from omegaconf import OmegaConf

    from ldm.exchange.folder import write_folder
    from ldm.loading import build_model
    from ldm.util import load_yaml
    from ldm.weight_files import in_precision, write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    config = load_yaml(YAML)
    for key, value in SMALL.items() if small else ():
        OmegaConf.update(config.model.params, key, value, force_add=True)
    OmegaConf.save(config, folder / "model.yaml")
    torch.manual_seed(0)
    state = build_model(config).state_dict()
    state = {k: torch.randn(v.shape) * 0.02 if v.is_meta else v for k, v in state.items()}
    state = in_precision(state, torch.float16) if half else state
    for kind in ("safetensors", "ckpt"):
        write_tensors(state, folder / f"model.{kind}", kind)
    write_folder(state, config, folder / "pipeline")


def load(side: str, folder: Path) -> list[Any]:
    """The networks of the model in `folder`, on the CPU in fp32."""
    path = folder / SIDES[side]
    if side == PEER:
        import torch
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
        return [pipe.unet, pipe.vae, pipe.text_encoder]
    from ldm.loading import load_model

    return [load_model(None if path.is_dir() else folder / "model.yaml", path, "cpu")]


def memory(line: str) -> float:
    """VmRSS or VmHWM (its highest value since it was reset) of this process, in bytes; Linux only."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    return 1024 * int(status.read_text().split(f"{line}:")[1].split()[0])


def measure(side: str, folder: Path, warm_up: Path) -> dict[str, float]:
    """Load once: seconds until the model is there, seconds until all its weights were read, peak memory / weights.

    `warm_up` holds a small model that is loaded before, so that imports are not measured.
    """
    load(side, warm_up)
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.perf_counter()
    networks = load(side, folder)
    loaded = time.perf_counter() - start
    weights = [p.detach() for network in networks for p in network.parameters()]
    total = sum(float(weight.sum()) for weight in weights)
    read = time.perf_counter() - start
    if not math.isfinite(total):
        raise RuntimeError(f"{side}: the weights are no numbers")
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"loaded": loaded, "read": read, "memory": (memory("VmHWM") - before) / size, "bytes": size}


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians of every side, and their ratios to diffusers', as a table in Markdown."""
    medians = {
        side: {key: median(run[key] for run in runs) for key in ("loaded", "read", "memory")}
        for side, runs in results.items()
    }
    size = next(iter(results.values()))[0]["bytes"] / 2**30
    lines = [
        f"Weights: {size:.2f} GiB in memory. Medians of {len(next(iter(results.values())))} processes each.",
        "",
        "| | loaded | ratio | every weight read | ratio | peak memory / weights |",
        "|---|---|---|---|---|---|",
    ]
    for side, row in medians.items():
        ratios = {key: row[key] / medians[PEER][key] for key in ("loaded", "read")}
        lines.append(
            f"| {side} | {row['loaded']:.2f} s | {ratios['loaded']:.2f} | {row['read']:.2f} s | {ratios['read']:.2f} "
            f"| {row['memory']:.2f} |"
        )
    return lines


def run_side(side: str, folder: Path) -> dict[str, float]:
    """`measure` in a process of its own, the files already in the system's cache."""
    path = folder / SIDES[side]
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as content:
                while content.read(1 << 24):
                    pass
    command = [sys.executable, __file__, "--measure", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    """Parse the flags, write the models, measure every side in turn, print the table."""
    options = parser().parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options.measure, Path(options.folder), Path(options.folder) / "warm-up")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        write_models(folder, options.small, options.half)
        write_models(folder / "warm-up", small=True, half=options.half)
        results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.runs or (2 if options.small else 5)):
            for side in SIDES:
                results[side].append(run_side(side, folder))
        print("\n".join(table(results)))


if __name__ == "__main__":
    cli.run(main)
