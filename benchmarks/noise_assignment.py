"""Pairing images with noise: time and peak memory, beside the usual ways, on the CPU.

python benchmarks/noise_assignment.py            # batches of 64 to 4096, 4096 numbers a sample
python benchmarks/noise_assignment.py --small    # small batches, to see that it runs

Broadcast: distances from a B x B x D array of differences in half precision, then SciPy.
Cdist: torch.cdist, then SciPy. Ratios above 1 are more than here.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli

BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
SMALL = (16, 64)
SLOW = 5.0  # seconds; what takes longer is run once
HERE, BROADCAST, CDIST, KNN = "assignment here", "broadcast", "cdist", "KNN here"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="Time and peak memory of pairing images with noise.")
    parser.add_argument("--small", action="store_true", help="small batches, for a quick run")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes (default: 64 to 4096)")
    parser.add_argument("--size", type=int, help="numbers a sample (default: 4096, with --small 256)")
    parser.add_argument("--k", type=int, default=64, help="KNN's draws a sample (default: 64)")
    parser.add_argument("--runs", type=int, default=3, help="the fastest of so many runs counts (default: 3)")
    parser.add_argument(
        "--most", type=float, default=3.0, help="GiB beyond which broadcasting does not fit (default: 3)"
    )
    return parser


def broadcast(x: Any, noise: Any) -> Any:
    """Indices by SciPy from distances [B, B] of a B x B x D array in half precision."""
    import torch
    from scipy.optimize import linear_sum_assignment

    cost = (x.half()[:, None] - noise.half()[None]).norm(dim=2).numpy()
    return torch.from_numpy(linear_sum_assignment(cost)[1])


def broadcast_bytes(batch: int, size: int) -> int:
    """What the array of differences alone needs."""
    return 2 * batch * batch * size


def cdist(x: Any, noise: Any) -> Any:
    """Indices by SciPy from torch.cdist's distances [B, B]."""
    import torch
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(torch.cdist(x, noise).numpy())[1])


def measure(work: Callable[[], Any], runs: int) -> tuple[Any, float, float]:
    """The result of `work`, its fastest run in seconds, and its peak memory beyond what was there before, in bytes.

    Of the peaks the least counts, for the first run also has buffers that libraries keep. Slow work is run once.
    """
    from ldm.evaluation.cost import memory, start_counting

    seconds = peak = math.inf
    for _ in range(runs):
        start_counting()
        before, start = memory("VmRSS"), time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
        peak = min(peak, memory("VmHWM") - before)
        if seconds > SLOW:
            break
    return result, seconds, peak


def measure_batch(batch: int, size: int, k: int, runs: int, most: float) -> dict[str, dict[str, float]]:
    """Seconds, peak bytes and share of rows unlike the exact assignment's, of each way; unlike images of any norm."""
    import torch

    from ldm.modules.noise import assign, nearest_of
    from ldm.modules.randomness import SampleRandom

    torch.manual_seed(0)
    x = torch.randn(batch, size) * (0.5 + torch.rand(batch, 1)) + 0.3 * torch.randn(batch, 1)
    noise = torch.randn(batch, size)
    ways = {HERE: lambda: assign(x, noise), CDIST: lambda: cdist(x, noise)}
    if broadcast_bytes(batch, size) <= most * 2**30:
        ways[BROADCAST] = lambda: broadcast(x, noise)
    results, exact = {}, None
    for way, work in ways.items():
        order, seconds, peak = measure(work, runs)
        exact = order if exact is None else exact
        unlike = float((order != exact).double().mean())
        results[way] = {"seconds": seconds, "bytes": peak, "unlike": unlike}
    _, seconds, peak = measure(lambda: nearest_of(x, SampleRandom(0, 0, 0, batch, "cpu"), k), runs)
    return results | {KNN: {"seconds": seconds, "bytes": peak, "unlike": math.nan}}


def rows(batch: int, size: int, results: dict[str, dict[str, float]]) -> list[str]:
    """Lines of the table for one batch size."""
    ours, lines = results[HERE], []
    for way in (HERE, CDIST, BROADCAST, KNN):
        if way not in results:
            needed = broadcast_bytes(batch, size) / 2**30
            lines.append(f"| {batch} | {way} | does not fit | | {needed:.0f} GiB | | |")
            continue
        row = results[way]
        times, room = row["seconds"] / ours["seconds"], row["bytes"] / max(ours["bytes"], 1)
        unlike = "" if math.isnan(row["unlike"]) else f"{row['unlike']:.3f}"
        lines.append(
            f"| {batch} | {way} | {row['seconds']:.4f} s | {times:.2f} | {row['bytes'] / 2**20:.0f} MiB | {room:.2f} "
            f"| {unlike} |"
        )
    return lines


def main(argv: Sequence[str]) -> None:
    """Parse the flags, measure every batch size in turn, print the table as it grows."""
    options = parser().parse_args(argv)
    size = options.size or (256 if options.small else 4096)
    batches = options.batches or (SMALL if options.small else BATCHES)
    import torch

    measure_batch(16, 64, 2, 1, options.most)  # imports and first calls are not measured
    print(f"{size} numbers a sample, KNN with k = {options.k}, {torch.get_num_threads()} threads\n")
    print(
        "| batch | way | time | / here | peak memory | / here | rows unlike the exact |\n|---|---|---|---|---|---|---|"
    )
    for batch in batches:
        print(
            "\n".join(rows(batch, size, measure_batch(batch, size, options.k, options.runs, options.most))), flush=True
        )


if __name__ == "__main__":
    cli.run(main)
