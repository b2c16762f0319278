"""What a process knows of others: of its run's, by the variables of launchers, and of those that use a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
LAUNCHER = "LDM_LAUNCHER"  # the number of the process that Lightning starts a machine's others from
launched = os.environ.get(LAUNCHER) == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0"


def is_first() -> bool:
    """Whether this is the run's first process, or its only one."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def only_first_prints() -> None:
    """Keep standard output for the run's first process; errors of all of them are seen."""
    os.environ[LAUNCHER] = str(os.getpid())
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def exit_code(code: int) -> int:
    """`code`; but 0 in processes that Lightning started, on whose failure it kills the one that reports."""
    return 0 if launched else code


def devices_of_launcher() -> dict[str, int]:
    """`devices` and `num_nodes` as torchrun or Slurm's srun set them; nothing without them."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        local = int(env["LOCAL_WORLD_SIZE"])
        return {"devices": local, "num_nodes": int(env["WORLD_SIZE"]) // local}
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(env.get("SLURM_NNODES", 1))
        return {"devices": int(env["SLURM_NTASKS"]) // nodes, "num_nodes": nodes}
    return {}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, which is made if it is not there.

    The system lets go of the folder when the process ends, however it ends. Windows has no such locks: there nobody
    is kept out.

    Raises:
        UserError: another process is there, or there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    try:
        if handle is not None:
            _lock(handle, folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    import fcntl  # not on Windows

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another program is writing to {folder}; let it end, or give another folder") from None
