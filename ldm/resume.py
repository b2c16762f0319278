"""Where a training run stands, kept in its checkpoints, and how another run takes it up from there."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

KEY = "place"  # of a Place in a checkpoint
DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"  # that runs' folders are named by


@dataclass
class Place:
    """Where a run stood when its last whole optimiser step ended.

    A checkpoint written in the middle of an accumulation stands at the step before: the batches since then are
    trained on again, with the same random numbers.

    Attributes:
        epoch, batches: the epoch (from 0), and the batches of it that are done, a process.
        total: batches of all epochs, a process. batches_seen: the model's count, which its random numbers depend on.
        global_batch: samples a batch over all processes. learning_rate: the base one, before any schedule.
    """

    epoch: int = 0
    batches: int = 0
    total: int = 0
    batches_seen: int = 0
    global_batch: int = 1
    learning_rate: float = 0.0

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Put the place into a checkpoint."""
        checkpoint[KEY] = asdict(self)


def global_batch(trainer: Any) -> int:
    """Samples a batch over all processes, as the data module says, or the loader that training was given."""
    return trainer.world_size * getattr(trainer.datamodule or trainer.train_dataloader, "batch_size", 1)


def enter(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> Place | None:
    """Make Lightning go on from the place in `checkpoint`, which it is about to restore; None for one without.

    Lightning's own account differs between saves at the end of a batch, an epoch and a validation. Here it is written
    anew, in one of two forms: after some batches of an epoch, or before an epoch's first. A changed batch size keeps
    the place to the sample, rounded down to whole batches. (With aspect-ratio buckets it keeps the count alone: other
    sizes make other batches of an epoch, see `reshuffled`.) A changed learning rate replaces the one that the
    optimisers and schedules bring along.
    """
    if KEY not in checkpoint:
        return None
    place = Place(**checkpoint[KEY])
    batches = place.batches * place.global_batch // global_batch(trainer)
    batches -= batches % trainer.accumulate_grad_batches
    _write_loops(checkpoint["loops"]["fit_loop"], place, batches, trainer.max_steps != -1, checkpoint["global_step"])
    module.batches_seen = place.batches_seen
    if place.learning_rate and place.learning_rate != module.learning_rate:
        _scale_learning_rate(checkpoint, module.learning_rate / place.learning_rate)
    return place


def reshuffled(trainer: Any, place: Place) -> bool:
    """Whether the rest of the epoch in which a run stood may repeat samples of its beginning and leave others out.

    An epoch of aspect-ratio buckets is an order of batches, which depends on their size.
    """
    train = getattr(trainer.datamodule, "datasets", {}).get("train")
    in_buckets = getattr(train, "bucket_of", None) is not None
    return in_buckets and place.batches > 0 and place.global_batch != global_batch(trainer)


def _write_loops(loops: dict[str, Any], place: Place, batches: int, by_steps: bool, steps: int) -> None:
    epoch, total = place.epoch, place.total
    begun = epoch + (batches > 0)
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    loops["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    if batches:  # as in the hook that ends a batch: Lightning counts it as completed itself
        of_all = {"ready": total, "started": total, "processed": total, "completed": total - 1}
    else:  # as no hook leaves it, so that Lightning takes it for none of its special cases
        of_all = {"ready": total, "started": total - 1, "processed": total, "completed": total}
    of_epoch = {"ready": batches, "started": batches, "processed": batches, "completed": max(batches - 1, 0)}
    loops["epoch_loop.batch_progress"] = {"total": of_all, "current": of_epoch, "is_last_batch": False}
    none = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    loops["epoch_loop.val_loop.batch_progress"] = {"total": dict(none), "current": dict(none), "is_last_batch": False}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - (by_steps or batches > 0)  # the logger's step


def _scale_learning_rate(checkpoint: dict[str, Any], factor: float) -> None:
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    for scheduler in checkpoint["lr_schedulers"]:
        scheduler |= {key: [lr * factor for lr in scheduler[key]] for key in ("base_lrs", "_last_lr")}


# ---- which checkpoint --------------------------------------------------------------------------------------


def newest_run(logdir: str | os.PathLike[str], prefix: str, name: str) -> Path | None:
    """The newest folder `<prefix><date>_<name>` in `logdir` that holds a checkpoint; None where there is none."""
    pattern = re.compile(re.escape(prefix) + DATE + re.escape(f"_{name}"))
    folders = [path for path in Path(logdir).glob("*") if pattern.fullmatch(path.name)]
    return max((path for path in folders if list(path.glob("checkpoints/*.ckpt"))), default=None)


def find(path: str) -> tuple[Path, Path]:
    """The run's folder and the checkpoint to go on from, for `--resume` with either of them.

    Raises:
        UserError: there is no such run, or no checkpoint of it can be read.
    """
    where = Path(path)
    if where.suffix == ".ckpt" and where.exists():
        check(where)
        return (where.parent.parent if where.parent.name == "checkpoints" else where.parent), where
    if not where.is_dir():
        raise UserError(f"--resume: there is no run or checkpoint '{path}'")
    return where, newest_good(where / "checkpoints")


def newest_good(folder: Path) -> Path:
    """The checkpoint in `folder` that records the latest step, of those that can be read; says which cannot.

    Raises:
        UserError: there is none.
    """
    found, broken = [], []
    for path in folder.glob("*.ckpt"):
        try:
            found.append((step_of(path), path.stat().st_mtime, path))
        except UserError as error:
            broken.append(error)
    for _, _, path in sorted(found, reverse=True):
        try:
            check_whole(path)
        except UserError as error:
            broken.append(error)
            continue
        for error in broken:
            print(f"{error}; going on from '{path.name}'")
        return path
    why = "; ".join(map(str, broken)) or "there is no checkpoint in it"
    raise UserError(f"--resume: '{folder}' has nothing to go on from: {why}")


def check(path: Path) -> None:
    """Raise UserError unless `path` is a whole checkpoint of a training run."""
    step_of(path)
    check_whole(path)


def step_of(path: Path) -> int:
    """The step that a checkpoint of a training run records; -1 for a folder, as sharding strategies write them.

    Raises:
        UserError: the file cannot be read, or holds weights alone.
    """
    import torch

    from ldm.weight_files import one_line

    if path.is_dir():
        return -1
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many types for damaged files
        raise UserError(f"checkpoint '{path}' is damaged ({one_line(error)[:120]})") from error
    if not isinstance(content, dict) or "optimizer_states" not in content:
        raise UserError(f"checkpoint '{path}' holds weights alone; start from them with --actual_resume {path}")
    return content["global_step"]


def check_whole(path: Path) -> None:
    """Raise UserError where a checkpoint's bytes are not those that were written, by their checksums."""
    if path.is_dir():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"checkpoint '{path}' is damaged ({error})") from error
    if bad is not None:
        raise UserError(f"checkpoint '{path}' is damaged (in {bad})")


def renew_last(checkpoint: Path) -> None:
    """Copy `checkpoint` to the `last.ckpt` beside it where that is older, missing or damaged.

    A run may be killed after the one is written and before the other is.
    """
    from ldm.util import atomic_path

    last = checkpoint.with_name("last.ckpt")
    if checkpoint == last or checkpoint.is_dir():
        return
    try:
        behind = step_of(last) < step_of(checkpoint)
    except UserError:
        behind = True
    if behind:
        with atomic_path(last) as temporary:
            shutil.copyfile(checkpoint, temporary)


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files of runs that were killed while they saved."""
    for path in folder.glob(".*.ckpt.*.tmp"):
        path.unlink(missing_ok=True)


# ---- what was changed ---------------------------------------------------------------------------------------


def changes(before: Any, after: Any) -> Iterator[str]:
    """One line a setting that differs between two yaml mappings: `lightning.trainer.max_steps: 2 -> 4`."""
    old, new = dict(_flat(before)), dict(_flat(after))
    for key in sorted(old.keys() | new.keys()):
        was, is_now = old.get(key, "not set"), new.get(key, "not set")
        if was != is_now:
            yield f"{key}: {was} -> {is_now}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if hasattr(entry, "items") and entry:
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry
