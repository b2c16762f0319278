"""Rows `assign*` and `knn*`: pairing images with noise.

python benchmarks/noise_assignment.py                # batches of 256 to 4096, 4096 numbers a sample
python benchmarks/noise_assignment.py --size tiny    # small batches, to see that it runs

Broadcast is the paper authors' way: distances from a B x B x D array of differences in half precision, then SciPy;
its results differ from the exact ones, and beyond a batch of 256 it needs 8 GiB and more. Cdist is torch.cdist, then
SciPy. KNN is measured beside drawing its k noises alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli

K = 64
MODULES = ("ldm.modules.noise", "scipy.optimize")


def _pair(settings: Settings, batch: int) -> tuple[Any, Any]:
    """Images [B, D] of different norms and means, and noise."""
    size = 4096 if settings.full else 256
    norms, means = random_model.draw(batch, 1, seed=1).sigmoid() + 0.5, random_model.draw(batch, 1, seed=2)
    x = random_model.draw(batch, size) * norms + 0.3 * means
    return x.to(settings.device), random_model.draw(batch, size, seed=3).to(settings.device)


def _job(order: Callable[[], Any], x: Any, noise: Any) -> Job:
    """What both ways must agree on is the least total distance."""
    import torch

    def result() -> float:
        indices = torch.as_tensor(order()).to(noise.device)
        return float((x.double() - noise[indices].double()).norm(dim=1).sum())

    return Job(order, result)


def assignment(settings: Settings, batch: int) -> Job:
    from ldm.memory import keep_freed
    from ldm.modules.noise import assign

    keep_freed()  # as `ldm.training.train` does
    x, noise = _pair(settings, batch)
    return _job(lambda: assign(x, noise), x, noise)


def broadcast(settings: Settings, batch: int) -> Job:
    from scipy.optimize import linear_sum_assignment

    x, noise = _pair(settings, batch)

    def work() -> Any:
        cost = (x.half()[:, None] - noise.half()[None]).norm(dim=2)
        return linear_sum_assignment(cost.cpu().numpy())[1]

    return _job(work, x, noise)


def cdist(settings: Settings, batch: int) -> Job:
    import torch
    from scipy.optimize import linear_sum_assignment

    x, noise = _pair(settings, batch)
    return _job(lambda: linear_sum_assignment(torch.cdist(x, noise).cpu().numpy())[1], x, noise)


def _random(settings: Settings, batch: int) -> Any:
    from ldm.modules.randomness import SampleRandom

    return SampleRandom(0, 0, 0, batch, settings.device)


def knn(settings: Settings, batch: int) -> Job:
    from ldm.memory import keep_freed
    from ldm.modules.noise import nearest_of

    keep_freed()  # likewise
    x, _ = _pair(settings, batch)
    return Job(lambda: nearest_of(x, _random(settings, batch), K))


def draws(settings: Settings, batch: int) -> Job:
    """The k noises of every sample, a sample at a time, into the same memory."""
    import torch

    x, _ = _pair(settings, batch)
    out = torch.empty(K, x.shape[1], device=x.device)

    def work() -> None:
        for generator in _random(settings, batch).generators:
            out.normal_(generator=generator)

    return Job(work)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""

    def row(name: str, batch: int, here: Any, there: Any, peer: str, **more: Any) -> Row:
        arguments = {"batch": batch}
        title = f"{'KNN, k=64' if here is knn else 'noise assignment'}, batch {batch}"
        ways = Way("here", here, arguments, MODULES), Way(peer, there, arguments, MODULES)
        return Row(f"{name}_{batch}", title, *ways, **more)

    batches = (256, 1024, 4096) if settings.full else (16, 64)
    cdists = [
        row("assign", n, assignment, cdist, "cdist and SciPy", bar=1.0, tolerance=1e-6, rounds=9 if n < 1024 else 5)
        for n in batches
    ]
    seeds = [row("assign_broadcast", n, assignment, broadcast, "broadcast in fp16 and SciPy", bar=0.3, tolerance=1e-3)
             for n in batches[:1]]  # fmt: skip
    nearest = [row("knn", n, knn, draws, "drawing the noises alone", bar=1.5, tolerance=None) for n in batches[:2]]
    return [*cdists, *seeds, *nearest]


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
