"""The training runs of a study of personalisation: those that are missing, beside each other, with one bar."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ldm.evaluation import jobs
from ldm.evaluation.records import Records
from ldm.processes import alone_in


class Trial(Protocol):
    """One run: of photos, prior images and pictures of a seed, and the name of its files."""

    seed: int

    @property
    def name(self) -> str: ...


class Steps:
    """Counts, called at every step, the steps of all processes; one whose parent has gone ends."""

    def __init__(self) -> None:
        self.value = jobs.context().Value("q", 0)

    def __call__(self, *_: Any) -> None:
        with self.value.get_lock():
            self.value.value += 1
        if not parent_process().is_alive():
            os._exit(1)


def run_trials(
    settings: Mapping[Any, Mapping[str, Any]],
    bench_of: Callable[[Namespace, int], Any],
    run: Callable[[Namespace, Any, Steps], None],
    options: Namespace,
) -> list[dict[str, Any]]:
    """Every trial's record; those not yet there are made, as many at once as there are `processes`.

    Args:
        settings: of a `Trial`, what its record depends on: one made under other settings is made anew.
        bench_of: (options, seed) -> the seed's `Bench`, in `bench_folder`. run: (options, trial, tell) makes a
            record, calling `tell` at every step. Both are functions of a module, the work of processes.
        options: with outdir, processes and steps, those of a run.

    Raises:
        UserError: a run failed; finished ones are kept.
    """
    out, records = Path(options.outdir), Records(Path(options.outdir))
    with alone_in(out):
        missing = [trial for trial, wanted in settings.items() if records.kept(trial.name, wanted) is None]
        if missing:
            print(f"{len(settings) - len(missing)} of {len(settings)} runs are there.", flush=True)
            _run(missing, bench_of, run, options)
    found = [records.kept(trial.name, wanted) for trial, wanted in settings.items()]
    return [record for record in found if record]


def _run(missing: list[Any], bench_of: Any, run: Any, options: Namespace) -> None:
    seeds, logs, steps = dict.fromkeys(trial.seed for trial in missing), Path(options.outdir) / "logs", Steps()
    print(f"Prior images of {len(seeds)} seeds ...", flush=True)
    jobs.run_jobs({f"seed-{seed}": (bench_of, (options, seed)) for seed in seeds}, options.processes, logs)
    with tqdm(total=options.steps * len(missing), unit="step", desc="Training") as bar:

        def advance(done: int) -> None:
            bar.set_postfix(runs=f"{done} of {len(missing)}", refresh=False)
            bar.update(steps.value.value - bar.n)

        work = {trial.name: (run, (options, trial, steps)) for trial in missing}
        jobs.run_jobs(work, options.processes, logs, advance)
    for seed in seeds:
        shutil.rmtree(bench_folder(options, seed) / "runs", ignore_errors=True)  # of runs that were killed


def bench_folder(options: Namespace, seed: int) -> Path:
    """Where what all runs of a seed share is kept."""
    return Path(options.outdir) / f"seed-{seed}"
