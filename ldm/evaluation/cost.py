"""What a network costs: the time of a forward pass side by side with others', and the memory that it needs beside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm.memory import give_back


def resident(line: str) -> float:
    """VmRSS or VmHWM (its highest value since it was reset) of this process, in bytes; Linux only."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    return 1024 * int(status.read_text().split(f"{line}:")[1].split()[0])


def begin_peak(device: torch.device) -> None:
    """Forget how high memory has been: the device's, or on a CPU VmHWM, on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """Bytes at the peak since `begin_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The time of one call of `work`."""
    if cuda := device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def run_once(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, bytes at the peak beyond what was there before) of one call of `work`."""
    give_back()
    begin_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident("VmRSS")
    return seconds_of(work, device), peak(device) - before


def training_meter() -> Any:
    """A Lightning callback that has, when the training is over, what it cost on a CPU.

    `seconds`: processor time of all threads of this process, from the first step's beginning to the last one's end,
    which a busy machine hardly lengthens. `bytes`: the peak of resident memory in that time, beyond what was there
    before it: Python, libraries, model and data; Linux only. Earlier trainings in the same process leave their buffers.
    """
    from pytorch_lightning.callbacks import Callback

    class TrainingMeter(Callback):
        seconds = bytes = math.nan

        def on_train_start(self, *_: Any) -> None:
            give_back()
            begin_peak(torch.device("cpu"))
            self.before, self.start = resident("VmRSS"), time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds, self.bytes = time.process_time() - self.start, resident("VmHWM") - self.before

    return TrainingMeter()


def side_by_side(
    works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Name -> median `seconds` and least peak `bytes`, of calls in turn: a slow moment of the machine hits all.

    A round before the first is not counted. Of the peaks the least counts, for early calls also have buffers that
    libraries keep.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            result = run_once(work, device)
            if turn:
                measured[name].append(result)
    return {
        name: {"seconds": median(s for s, _ in results), "bytes": min(b for _, b in results)}
        for name, results in measured.items()
    }
