"""Training runs inside of the test process: what main.py does, on the smallest configuration."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

from benchmarks.kill import CONFIG, differences
from ldm import cli
from ldm.run import add_flags, read_run
from ldm.training import train

QUIET = ["lightning.trainer.logger=false"]


def run(logs: Path, *words: Any) -> Any:
    """Begin a run in `logs`, or with `--resume` take one up; the trainer."""
    parser = cli.ArgumentParser()
    add_flags(parser)
    begun = [] if "--resume" in words else ["--base", CONFIG, *QUIET, "--scale_lr", "False", "-n", "run"]
    return train(read_run(parser.parse_intermixed_args([*begun, "-t", "-l", str(logs), *map(str, words)])))


def folder(logs: Path) -> Path:
    """The folder of the only run in `logs`."""
    (only,) = logs.iterdir()
    return only


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content."""
    return torch.load(path, weights_only=True)


def last(logs: Path) -> dict[str, Any]:
    """What the only run in `logs` saved last."""
    return load(folder(logs) / "checkpoints" / "last.ckpt")


def assert_equal(a: dict, b: dict) -> None:
    """Two checkpoints hold the same training to the bit."""
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "place"):
        assert not list(differences(a[key], b[key], key))


class At(Callback):
    """Does something at a moment of a run; a yaml's callback, so that it comes where a user's would.

    Args:
        hook: the hook of Lightning. batch: the batch (from 0, over all epochs) after which it is done.
        deed: `signal` (with `what` as its name), `save` (to `what`) or `file_limit` (of `what` bytes).
    """

    def __init__(self, hook: str, batch: int, deed: str, what: Any) -> None:
        self.batch, self.deed, self.what = batch, deed, what
        setattr(self, hook, self._now)

    def _now(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.total_batch_idx != self.batch:
            return
        if self.deed == "signal":
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.deed == "save":
            trainer.save_checkpoint(self.what)
        else:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.what, resource.RLIM_INFINITY))


def at(hook: str, batch: int, deed: str, what: Any) -> list[str]:
    """The words of a command line that put an `At` into a run."""
    params = {"hook": hook, "batch": batch, "deed": deed, "what": what}
    words = [f"lightning.callbacks.at.params.{key}={value}" for key, value in params.items()]
    return [f"lightning.callbacks.at.target={At.__module__}.At", *words]
