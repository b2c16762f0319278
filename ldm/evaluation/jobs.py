"""Runs of a study beside each other, each in a process of its own, so that what it costs can be measured."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ldm.errors import UserError

HEAVY = ["pytorch_lightning", "transformers", "ldm.inference"]  # imported once, for all of them


def context() -> Any:
    """Processes start as copies of one that has imported what is heavy, and done nothing else."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(HEAVY)
    return found


def run_jobs(
    jobs: Mapping[str, tuple[Callable[..., None], tuple[Any, ...]]],
    processes: int,
    logs: Path,
    watch: Callable[[int], None] = lambda done: None,
) -> None:
    """Run every job, a function of a module and its arguments, with one thread, at most `processes` at once.

    Args:
        logs: where what a job prints is kept, as NAME.log. watch: told now and then how many have ended.

    Raises:
        UserError: a job failed; those that run are ended, and no more are begun.
    """
    waiting, running = list(jobs.items()), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, (target, arguments) = waiting.pop(0)
                process = context().Process(target=_run, args=(logs / f"{name}.log", target, arguments), name=name)
                process.start()
                running[process.sentinel] = process
            for sentinel in wait(list(running), timeout=0.5):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise UserError(_told(process, logs / f"{process.name}.log"))
            watch(len(jobs) - len(waiting) - len(running))
    finally:
        for process in running.values():
            process.kill()  # training takes other signals as a wish to save first
            process.join()


def _run(log: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(file, number)
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def _told(process: Any, log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
    last = text.splitlines()[-1].removeprefix("error: ") if text else f"it ended with code {process.exitcode}"
    return f"run {process.name} failed: {last} (all that it said is in {log}; finished runs are kept)"
