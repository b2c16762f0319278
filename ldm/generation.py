"""Many pictures in a folder, by any number of processes: what scripts/generate.py does.

Picture i is a function of (--seed + i, prompt i) and the settings, and lies in `00012/012345.png`. A file is there
whole or not at all, so what is there is done: a run that was stopped, however, goes on by drawing what is lacking.
Which process draws a picture follows from its number alone, so that processes need not talk to each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data import captions
from ldm.data.base import list_images
from ldm.errors import UserError
from ldm.util import atomic_path

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
IN_A_FOLDER = 1000
MANIFEST_SECONDS = 60.0  # between two writings of the manifest
COUNT_SECONDS = 1.0  # between two looks at what all processes have done


def read_prompts(source: str, column: str | None = None, template: str | None = None) -> list[str]:
    """The prompts of a text file (one a line), a table, a folder of captioned images, or a yaml's data set.

    Args:
        source: *.txt; *.jsonl, *.csv or *.tsv; a folder with a table of captions or .txt files beside its images; or a
            yaml, for the captions of its `data.params.train`.
        column: the table's column; None means `caption`, `text` or `prompt`.
        template: `a photo of a {}`, in which every line is put: class labels become prompts.

    Raises:
        UserError: the source cannot be read or holds no prompts.
    """
    path = Path(source)
    if path.is_dir():
        found = _of_folder(path, column)
    elif path.suffix in (".yaml", ".yml"):
        found = _of_data_set(path)
    elif path.suffix in (".jsonl", ".csv", ".tsv"):
        found = _of_table(path, column)
    else:
        try:
            found = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts: '{source}' cannot be read as text: {error}") from None
    if not found:
        raise UserError(f"--prompts: '{source}' holds no prompts")
    return [template.format(label) for label in found] if template else found


def _of_table(path: Path, column: str | None) -> list[str]:
    rows = captions.read_table(path)
    if column is None and rows and "prompt" in rows[0]:
        column = "prompt"
    return [captions.pick_caption(row, column, f"{path}, entry {i}") for i, row in enumerate(rows, 1)]


def _of_folder(folder: Path, column: str | None) -> list[str]:
    for name in captions.TABLES:
        if (folder / name).is_file():
            return _of_table(folder / name, column)
    found = [captions.read_caption(path) for path in list_images(folder, recursive=True)]
    if None in found:
        raise UserError(
            f"--prompts: in '{folder}' {found.count(None)} of {len(found)} images have no caption beside them"
        )
    return found


def _of_data_set(path: Path) -> list[str]:
    from ldm.util import instantiate_from_config, load_yaml

    config = load_yaml(path)
    section = ((config.get("data") or {}).get("params") or {}).get("train")
    if section is None:
        raise UserError(f"--prompts: '{path}' has no data.params.train")
    dataset = instantiate_from_config(section)
    try:
        return [dataset[i]["caption"] for i in range(len(dataset))]
    except (TypeError, KeyError):
        raise UserError(f"--prompts: the items of {section['target']} cannot be counted or have no caption") from None


def fingerprint(path: str | os.PathLike[str]) -> str:
    """What tells a file or folder from another: its size, and 64 samples of its bytes.

    Other weights differ everywhere, so samples do, and a checkpoint of any size is told in no time.
    """
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}:{size};".encode())
        with open(file, "rb") as stream:
            for part in range(64):
                stream.seek(part * size // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """Which of `world` processes this is, and where among those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Place | None:
        """As torchrun tells it; None in a process that stands alone."""
        if "WORLD_SIZE" not in os.environ:
            return None
        return cls(*(int(os.environ.get(name, default)) for name, default in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be drawn, and where it goes.

    Args:
        prompts: picture i shows prompts[i % len(prompts)].
        count: pictures in all.
        flag: what named the folder, for messages.
    """

    folder: Path
    prompts: Sequence[str]
    seed: int
    count: int
    flag: str = "--outdir"

    def name(self, i: int) -> str:
        """A picture's file, from the folder."""
        return f"{i // IN_A_FOLDER:05}/{i:06}.png"

    def prompt(self, i: int) -> str:
        """A picture's prompt."""
        return self.prompts[i % len(self.prompts)]

    def present(self) -> list[int]:
        """The numbers of the pictures that are there, also of those beyond `count`."""
        found = []
        for folder in self.folder.glob("[0-9]" * 5):
            names = (re.fullmatch(r"(\d{6,})\.png", entry.name) for entry in os.scandir(folder))
            found += [int(match[1]) for match in names if match]
        return sorted(found)

    def batches(self, size: int, place: Place) -> list[range]:
        """One process' share: every `world`-th batch. A batch has the same pictures, whoever draws it."""
        return [range(first, min(first + size, self.count)) for first in range(0, self.count, size)][
            place.rank :: place.world
        ]

    def kept(self) -> dict[str, Any] | None:
        """The settings that are kept in the folder, if there are any.

        Raises:
            UserError: their file is damaged.
        """
        path = self.folder / SETTINGS
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{self.flag}: '{path}' cannot be read: {error}; name another folder") from error

    def agree(self, settings: dict[str, Any]) -> None:
        """Keep the settings in the folder, or compare them with those that are there.

        Raises:
            UserError: the folder's pictures were made otherwise, or cannot be written to.
        """
        words = hashlib.blake2b(json.dumps(list(self.prompts)).encode(), digest_size=12).hexdigest()
        settings = json.loads(json.dumps({**settings, "seed": self.seed, "prompts": words}))
        path, before = self.folder / SETTINGS, self.kept()
        if before is not None:
            unlike = [key for key in settings | before if settings.get(key) != before.get(key)]
            if unlike:
                said = ", ".join(f"{key} was {before.get(key)} and is {settings.get(key)}" for key in unlike[:3])
                raise UserError(f"{self.flag}: the pictures in '{self.folder}' are others: {said}; name another folder")
            return
        if self.present():
            raise UserError(f"{self.flag}: '{self.folder}' holds pictures but no {SETTINGS}; name another folder")
        try:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.flag}: cannot write to '{self.folder}': {error.strerror or error}") from error

    def write_manifest(self) -> None:
        """List the pictures that are there: file, prompt and seed, a line each; the file is whole at any time.

        Several processes may do it at once: who comes last has listed all that was there when it was done.
        """
        while True:
            present = self.present()
            with atomic_path(self.folder / MANIFEST) as temporary, open(temporary, "w", encoding="utf-8") as file:
                for i in present:
                    row = {"file": self.name(i), "prompt": self.prompt(i), "seed": self.seed + i}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if len(self.present()) == len(present):
                return

    def clean(self) -> None:
        """Remove what writings that were killed left behind; no process may be drawing."""
        for leftover in self.folder.glob("**/.*.tmp"):
            leftover.unlink(missing_ok=True)


class Progress:
    """A bar over the pictures of all processes, counted in the folder; it also keeps the manifest fresh."""

    def __init__(self, plan: Plan, shown: bool) -> None:
        from tqdm import tqdm

        self.plan, self.counted, self.written = plan, 0.0, time.monotonic()
        there = self.count()
        self.bar = tqdm(total=plan.count, initial=there, desc="Pictures", unit="", disable=not shown, smoothing=0.05)
        if shown and there:
            print(f"{there} of {plan.count} pictures are there already")

    def count(self) -> int:
        return sum(i < self.plan.count for i in self.plan.present())

    def look(self, last: bool = False) -> None:
        """Bring the bar, and now and then the manifest, up to date."""
        now = time.monotonic()
        if not self.bar.disable and (last or now - self.counted > COUNT_SECONDS):
            self.counted = now
            self.bar.update(self.count() - self.bar.n)
        if last or (not self.bar.disable and now - self.written > MANIFEST_SECONDS):
            self.written = now
            self.plan.write_manifest()
        if last:
            self.bar.close()


Draw = Callable[[list[str], list[int]], Sequence[Any]]


def draw_share(plan: Plan, place: Place, draw: Draw, batch_size: int, exact: bool, shown: bool = True) -> int:
    """Draw and write one process' share of what is lacking; returns how many pictures the safety checker blocked.

    Args:
        draw: prompts and seeds -> `ldm.outputs.Picture`s.
        exact: pictures do not depend on their batch, so that of a batch which is there in part only the rest is
            drawn; else all of it, so that its pictures come out as they would have.
        shown: this process has the bar, and waits with it until all processes are done.
    """
    parent = os.environ.get("GENERATE_PARENT")
    progress = Progress(plan, shown)
    blocked = 0
    try:
        for batch in plan.batches(batch_size, place):
            if parent and int(parent) != os.getppid():
                raise UserError("the process that started this one is gone; start again to go on")
            lacking = [i for i in batch if not (plan.folder / plan.name(i)).is_file()]
            places = lacking if exact else list(batch)
            if lacking:
                pictures = draw([plan.prompt(i) for i in places], [plan.seed + i for i in places])
                for i, picture in zip(places, pictures, strict=True):
                    if i in lacking:
                        picture.save(plan.folder / plan.name(i))
                        blocked += picture.blocked
            progress.look()
        while shown and progress.count() < plan.count:  # the others are not done
            time.sleep(COUNT_SECONDS)
            progress.look()
    finally:
        progress.look(last=True)
    return blocked
