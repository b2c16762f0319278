"""Two ways of doing one job, by turns: each in a process of its own, on the same weights and inputs.

A row of the table is a `Row`: our way and a peer's. A way is a function that builds the job, in its process, from
`Settings`, and gives back what is to be timed. Processes take turns, so that a slow moment of the machine hits both,
and the order changes from round to round. Before anything is timed the results of both are compared.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

COPIES = ("copy_", "clone", "_to_copy", "contiguous", "cat", "constant_pad_nd")  # operations that only move numbers
TURN = 0.2  # seconds: what takes less is done several times in its turn, and its median counts
WAITS = ("_local_scalar_dense", "nonzero", "item")  # for which a GPU's work must be finished


@dataclass(frozen=True)
class Settings:
    """What every way is told.

    Args:
        size: `full` is Stable Diffusion v1's; `tiny` runs the same code on a model of a few hundred thousand numbers.
        folder: holds the weights, see `random_model`.
    """

    size: str
    device: str
    folder: Path

    @property
    def full(self) -> bool:
        return self.size == "full"


@dataclass(frozen=True)
class Job:
    """What a way has built.

    Args:
        work: what is timed. result: what both ways must agree on, as an array, a number, or a list of these; what
            `work` returns when none is given.
        measure: (seconds, bytes or NaN) of one run, for jobs that are processes of their own.
        least_bytes: how many bytes the work must read and write at least, for the limit; 0 when that is not known.
    """

    work: Callable[[], Any]
    result: Callable[[], Any] | None = None
    measure: Callable[[], tuple[float, float]] | None = None
    least_bytes: int = 0


@dataclass(frozen=True)
class Way:
    """One side of a row.

    Args:
        make: (settings, **arguments) -> Job, a function at the top of a module. modules: what it imports, whose time
            and memory do not count.
    """

    name: str
    make: Callable[..., Job]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        bar, memory_bar: the most that ours may take, as a share of theirs; None: whatever it is.
        tolerance: how far the results may lie apart, relative to the largest number; None: they are not comparable.
        rounds: how many turns each has. fresh: a new process every turn, for what two processes have no memory for
            at once, or what happens once a process. warm_up: whether such a process does the work once before.
        prepare: writes what both sides read, such as weights, where it is not there yet.
        asked: measured only when it is named.
    """

    name: str
    title: str
    ours: Way
    theirs: Way
    bar: float | None = None
    memory_bar: float | None = None
    tolerance: float | None = 1e-3
    rounds: int = 5
    fresh: bool = False
    warm_up: bool = True
    prepare: Callable[[Settings], Any] | None = None
    asked: bool = False


@dataclass(frozen=True)
class Counts:
    """What one run of a job consists of, whatever the machine."""

    flops: int
    calls: int  # of torch's operations
    copies: int
    copied: int  # bytes
    float64: int  # operations that give float64
    waits: int
    least_bytes: int


@dataclass(frozen=True)
class Result:
    """What was measured of a row; times and bytes are (ours, theirs) of every round."""

    row: Row
    seconds: list[tuple[float, float]]
    bytes: list[tuple[float, float]]
    difference: float | None
    counts: tuple[Counts, Counts]

    def medians(self) -> tuple[float, float]:
        """Seconds of ours and theirs."""
        return tuple(median(turn) for turn in zip(*self.seconds, strict=True))

    def ratios(self) -> tuple[float, float, float]:
        """(ours / theirs of the medians, least and greatest ratio of a round)."""
        ours, theirs = self.medians()
        rounds = [a / b for a, b in self.seconds]
        return ours / theirs, min(rounds), max(rounds)

    def memory(self) -> tuple[float, float]:
        """Peak bytes of ours and theirs: the least of the rounds, for early ones also fill buffers that stay."""
        return tuple(min(turn) for turn in zip(*self.bytes, strict=True))


# ---- in a process of its own ---------------------------------------------------------------------------------


def count(job: Job) -> tuple[Counts, Any]:
    """The operations of one run, and what it returned."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    seen: Counter[str] = Counter()

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func._can_decompose():  # in inference mode some operations come as a whole
                with self:
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            out = func(*args, **kwargs)
            name = func._schema.name.removeprefix("aten::")
            tensors = [leaf for leaf in tree_leaves(out) if hasattr(leaf, "element_size")]
            seen["calls"] += not func.is_view
            seen["waits"] += name in WAITS
            seen["float64"] += any(str(t.dtype) == "torch.float64" for t in tensors)
            if name in COPIES:
                seen["copies"] += 1
                seen["copied"] += sum(t.numel() * t.element_size() for t in tensors)
            return out

    with FlopCounterMode(display=False, custom_mapping=_formulas()) as flops, Listener():
        output = job.work()
    names = ("calls", "copies", "copied", "float64", "waits")
    return Counts(flops.get_total_flops(), *(seen[name] for name in names), job.least_bytes), output


def _formulas() -> dict[Any, Callable[..., int]]:
    """Floating-point operations of what torch does not count by itself: oneDNN's own."""
    import torch

    def linear(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * prod(x) * weight[0]

    def convolution(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return 2 * prod(out_shape) * prod(weight[1:])

    named = {"_linear_pointwise": linear, "_convolution_pointwise": convolution}
    there = {name: formula for name, formula in named.items() if hasattr(torch.ops.mkldnn, name)}
    return {getattr(torch.ops.mkldnn, name): formula for name, formula in there.items()}


def profile(job: Job) -> list[tuple[str, float, int]]:
    """(operation, its share of a run's processor time, calls), the dearest first, after a run that does not count."""
    from torch.profiler import profile

    job.work()
    with profile() as listened:
        job.work()
    found = [(e.key, e.self_cpu_time_total + e.self_device_time_total, e.count) for e in listened.key_averages()]
    total = sum(time for _, time, _ in found) or 1.0
    return sorted(((name, time / total, calls) for name, time, calls in found), key=lambda entry: -entry[1])


def _serve(connection: Any, way: Way, settings: Settings, threads: int) -> None:
    """The life of a worker: it builds its job, and does what it is told until it is told nothing more."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # progress and notes of either side
    try:
        import torch

        from ldm import memory
        from ldm.evaluation import cost

        torch.set_num_threads(threads)
        for module in way.modules:
            importlib.import_module(module)
        device = torch.device(settings.device)
        memory.give_back()
        before = cost.resident("VmRSS") if device.type == "cpu" else 0.0
        job = way.make(settings, **way.arguments)

        def settle() -> None:
            """Drop what only the making and the first run needed; a job that is measured at once is not spared it."""
            gc.collect()
            memory.give_back()

        def measure(least: float = 0.0) -> tuple[float, float]:
            """Of one run, or the median of as many as take `least` seconds together."""
            if job.measure is not None:
                return job.measure()
            cost.begin_peak(device)
            seconds = [cost.seconds_of(job.work, device)]
            while sum(seconds) < least:
                seconds.append(cost.seconds_of(job.work, device))
            return median(seconds), cost.peak(device) - before

        def check() -> tuple[Any, Counts]:
            result = job.result() if job.result else None  # first: a counted training step changes weights
            counts, output = count(job)
            output = plain(result if job.result else output)
            settle()
            return output, counts

        def run() -> None:
            job.work()
            settle()

        orders = {
            "measure": measure,
            "measure often": lambda: measure(TURN),
            "check": check,
            "run": run,
            "profile": lambda: profile(job),
        }
        connection.send((None, ""))
        while (order := connection.recv()) is not None:
            connection.send((orders[order](), ""))
    except Exception:
        connection.send((None, traceback.format_exc()))


def plain(value: Any) -> Any:
    """Tensors as arrays of NumPy, which need no shared memory on their way to another process."""
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else value


class Worker:
    """A way in its process; `worker("measure")` waits for what it answers."""

    def __init__(self, way: Way, settings: Settings) -> None:
        import torch

        self.way = way
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, way, settings, torch.get_num_threads()))
        self.process.start()
        theirs.close()
        self._answer()

    def __call__(self, order: str) -> Any:
        self.connection.send(order)
        return self._answer()

    def _answer(self) -> Any:
        try:
            value, error = self.connection.recv()
        except EOFError:
            self.process.join()
            error = f"its process ended with {self.process.exitcode}; too little memory is the usual cause"
        if error:
            raise RuntimeError(f"{self.way.name}: {error}")
        return value

    def close(self) -> None:
        """End the process."""
        try:
            self.connection.send(None)
        except OSError:  # it has ended
            pass
        self.process.join()


# ---- by turns ------------------------------------------------------------------------------------------------


@contextmanager
def workers(ways: Sequence[Way], settings: Settings) -> Iterator[list[Worker]]:
    """A process a way, ended with the block."""
    started: list[Worker] = []
    try:
        for way in ways:
            started.append(Worker(way, settings))
        yield started
    finally:
        for worker in started:
            worker.close()


def alone(way: Way, settings: Settings, *orders: str) -> list[Any]:
    """What a worker that lives for this alone answers."""
    with workers([way], settings) as (worker,):
        return [worker(order) for order in orders]


def difference(ours: Any, theirs: Any) -> float:
    """The greatest distance of two results, relative to the largest number of theirs."""
    import numpy as np

    if isinstance(theirs, list):
        return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"results of shapes {ours.shape} and {theirs.shape}")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def measure(row: Row, settings: Settings, rounds: int | None = None) -> Result:
    """Compare the results of both sides and count their operations, then time them by turns.

    Args:
        rounds: in place of the row's; 0 times nothing.

    Raises:
        RuntimeError: a side failed, or the results lie further apart than the row allows.
    """
    ways, rounds = (row.ours, row.theirs), row.rounds if rounds is None else rounds
    if row.prepare is not None:
        row.prepare(settings)
    measured: list[list[tuple[float, float]]] = [[], []]
    if row.fresh:
        warm = ["run"] if row.warm_up else []
        checks = [] if warm and rounds else [alone(way, settings, "check")[0] for way in ways]
        for turn in range(rounds):
            for side in sides(turn):
                if side == len(checks):  # a check does the work once, too
                    checks += alone(ways[side], settings, "check", "measure")
                    measured[side].append(checks.pop())
                else:
                    measured[side].append(alone(ways[side], settings, *warm, "measure")[-1])
    else:
        with workers(ways, settings) as pair:
            checks = [worker("check") for worker in pair]
            for turn in range(rounds):
                for side in sides(turn):
                    measured[side].append(pair[side]("measure often"))
    apart = None
    if row.tolerance is not None:
        apart = difference(checks[0][0], checks[1][0])
        if not apart <= row.tolerance:
            raise RuntimeError(f"{row.name}: the results differ by {apart:.1e}, more than {row.tolerance:.0e}")
    both = list(zip(*measured, strict=True))
    seconds, room = ([(a[i], b[i]) for a, b in both] for i in range(2))
    return Result(row, seconds, room, apart, (checks[0][1], checks[1][1]))


def sides(turn: int) -> tuple[int, int]:
    """Who comes first changes from round to round."""
    return (0, 1) if turn % 2 == 0 else (1, 0)
