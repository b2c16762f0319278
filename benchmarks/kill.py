"""Kill training runs at random moments, also while they save, resume them, and compare them with one never killed.

    python benchmarks/kill.py --runs 25
    python benchmarks/kill.py --runs 5 --processes 2

Weights, averaged weights, optimiser, schedule and place in the data are compared bit for bit. Exit code 1 when one
differs. Runs are main.py's, on the CPU, with benchmarks/kill.yaml; torch is imported once for all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = str(Path(__file__).with_suffix(".yaml"))
COMPARED = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "place")
PRELOAD = ["main", "ldm.training", "ldm.saving", "ldm.callbacks", "ldm.data.module", "ldm.models.diffusion.ddpm",
           "ldm.inference", "torch.utils.tensorboard", "torchvision",
           "transformers.models.clip.modeling_clip"]  # fmt: skip


# ---- runs as processes --------------------------------------------------------------------------------------


def starter() -> Any:
    """A multiprocessing context whose processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_main(words: list[str], env: dict[str, str], log: str) -> None:
    """Be main.py in this process, with these variables; what it says goes into the file `log`."""
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["main.py", *words]
    from ldm import cli
    from main import main

    cli.run(main, words)


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(processes: int) -> list[dict[str, str]]:
    """The variables that torchrun gives each of several processes on this machine; none for one alone."""
    if processes == 1:
        return [{}]
    world, port = str(processes), free_port()
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "kill",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start(
    context: Any, words: Sequence[str], log: str | os.PathLike[str], each: Sequence[Mapping[str, str]] = ({},)
) -> list[BaseProcess]:
    """Start main.py with `words`, a process for each set of variables; what they say goes into the file `log`."""
    alike = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = list(map(str, words))
    started = [context.Process(target=run_main, args=(words, alike | dict(env), str(log))) for env in each]
    for process in started:
        process.start()
    return started


def wait(started: Sequence[BaseProcess], timeout: float = 600) -> list[int | None]:
    """The exit codes; what has not ended by then is killed, and has None."""
    end = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    kill(started)
    return codes


def kill(started: Sequence[BaseProcess]) -> None:
    """SIGKILL to all of them that still run."""
    for process in started:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
    for process in started:
        process.join()


# ---- the moment ---------------------------------------------------------------------------------------------


def unfinished(logs: Path) -> list[Path]:
    """The files that are being written as checkpoints of the runs in `logs`, or were when they were killed."""
    return list(logs.glob("*/checkpoints/.*.tmp"))


def kill_at(started: Sequence[BaseProcess], seconds: float) -> bool:
    """Kill after so many seconds; False where they ended before."""
    started[0].join(seconds)
    alive = any(process.exitcode is None for process in started)
    kill(started)
    return alive


def kill_in_save(started: Sequence[BaseProcess], logs: Path, which: int) -> bool:
    """Kill in the `which`-th save that is seen (from 1); False where they ended before."""
    seen: set[Path] = set()
    while any(process.exitcode is None for process in started):
        seen |= set(unfinished(logs))
        if len(seen) >= which:
            kill(started)
            return True
        time.sleep(0.0005)
    return False


# ---- comparison ---------------------------------------------------------------------------------------------


def last_checkpoint(logs: Path) -> dict[str, Any]:
    """What the only run in `logs` saved last."""
    import torch

    (path,) = logs.glob("*/checkpoints/last.ckpt")
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The places in two nests of dicts, lists, tensors and numbers at which they differ in a bit."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield where
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys(), key=str):
            yield from differences(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif a != b:
        yield where


@dataclass
class Result:
    """One run that was killed: how often in a save, how often at all, and where it differs from the reference."""

    kills: int
    in_saves: int
    different: list[str]


class KillTest:
    """Runs of one kind and the reference that each must equal."""

    def __init__(self, folder: Path, processes: int, words: Sequence[str] = ()) -> None:
        self.context, self.folder, self.processes = starter(), folder, processes
        self.words = ["--base", CONFIG, *words, "-t", "--scale_lr", "False", "-n", "run"]
        wait(start(self.context, ["--help"], folder / "help.txt"))  # imports everything
        began = time.monotonic()
        self.reference = self.finished(folder / "reference")
        self.seconds = time.monotonic() - began

    def started(self, logs: Path) -> list[BaseProcess]:
        """A run in `logs`, begun or taken up."""
        logs.mkdir(parents=True, exist_ok=True)
        return start(self.context, [*self.words, "--resume", "-l", logs], logs / "log.txt", ranks(self.processes))

    def finished(self, logs: Path) -> dict[str, Any]:
        """The last checkpoint of the run in `logs`, which goes on to its end."""
        codes = wait(self.started(logs))
        if any(codes):
            raise SystemExit(f"a run ended with {codes}:\n{(logs / 'log.txt').read_text()[-3000:]}")
        content = last_checkpoint(logs)
        return {key: content[key] for key in COMPARED}

    def run(self, name: str, moments: Sequence[int | float]) -> Result:
        """A run that is killed at each of `moments` in turn: in that save (int), or after that share of the time.

        One that ended before it could be killed at all does not count: another begins, with earlier moments.
        """
        logs = self.folder / name
        kills = in_saves = 0
        for moment in moments:
            before = set(unfinished(logs))
            started = self.started(logs)
            if isinstance(moment, int):
                kills += kill_in_save(started, logs, moment)
            else:
                kills += kill_at(started, moment * self.seconds)
            in_saves += not before.issuperset(unfinished(logs))
        if not kills:
            return self.run(f"{name}-", [max(1, m // 2) if isinstance(m, int) else m / 2 for m in moments])
        return Result(kills, in_saves, list(differences(self.reference, self.finished(logs))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="runs to kill (25)")
    parser.add_argument("--processes", type=int, default=1, help="processes a run, by ddp over gloo (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        test = KillTest(Path(folder), options.processes)
        print(f"The run that is not killed takes {test.seconds:.1f} s.\n")
        print("| run | killed | of these in a save | equal to the bit |\n|---|---|---|---|")
        results = []
        for number in range(options.runs):
            moments = [dice.randint(1, 20) if dice.random() < 0.5 else dice.uniform(0.2, 1.0) for _ in range(2)]
            result = test.run(str(number), moments)
            results.append(result)
            said = f"no: {', '.join(result.different[:3])}" if result.different else "yes"
            print(f"| {number + 1} | {result.kills} | {result.in_saves} | {said} |", flush=True)
    kills, saves = sum(r.kills for r in results), sum(r.in_saves for r in results)
    wrong = sum(bool(r.different) for r in results)
    print(f"\n{kills} kills, {saves} of them in a save; {len(results) - wrong} of {len(results)} runs are equal.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
