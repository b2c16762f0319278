"""Adapters on the page: which there are. `ldm.artefacts` puts them into the model, which stays loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

ABOUT = "about.json"  # in the folder of what one training left behind: a word and LoRA, say, which belong together


@dataclass(frozen=True)
class Shelf:
    """The adapters that people can choose by name: those that were trained here, and those of other folders.

    Args:
        own: the folder in which lies what was trained here, a folder each.
        others: adapter directories, LoRA files and other .safetensors of a personalisation, or folders of them.
    """

    own: Path
    others: tuple[Path, ...] = ()

    def all(self) -> dict[str, Path]:
        """Name -> directory or file, those trained here first and the newest of them at the beginning."""
        found: dict[str, Path] = {}
        for path in sorted(self._in(self.own), key=lambda p: p.stat().st_mtime, reverse=True):
            found[path.name] = path
        for folder in self.others:
            for path in sorted(self._in(folder)):
                name, again = path.name, 2
                while name in found:
                    name, again = f"{path.name} ({again})", again + 1
                found[name] = path
        return found

    def find(self, name: str) -> list[Path]:
        """What `ldm.artefacts.use` takes for that name: mostly one, or several that were trained together.

        Raises:
            UserError: there is none of that name (any more).
        """
        if name not in (known := self.all()):
            raise UserError(f"adapter '{name}': it is not here any more; choose another")
        path = known[name]
        return sorted(filter(is_adapter, path.iterdir())) if (path / ABOUT).is_file() else [path]

    def prompt(self, name: str) -> str:
        """What a prompt calls the subject, as far as it is known."""
        from ldm import artefacts

        parts = self.find(name)
        about = parts[0].parent / ABOUT
        if about.is_file():
            return str(json.loads(about.read_text(encoding="utf-8")).get("prompt", ""))
        return artefacts.look(parts[0]).trigger

    def keep(self, name: str, files: Sequence[str | os.PathLike[str]], about: Mapping[str, Any]) -> None:
        """Move what a training left behind onto the shelf."""
        from ldm.util import atomic_path

        folder = self.own / name
        folder.mkdir(parents=True)
        for path in map(Path, files):
            os.replace(path, folder / path.name.partition("-")[2])  # without the step
        with atomic_path(folder / ABOUT) as temporary:  # from now on it is seen
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def _in(place: Path) -> list[Path]:
        if is_adapter(place):
            return [place]
        return [path for path in place.iterdir() if is_adapter(path)] if place.is_dir() else []


def is_adapter(path: Path) -> bool:
    """Whether that is an adapter directory, a file of LoRA, a word or weights, or what a training on the page left."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return (path / ABOUT).is_file() or next(path.glob("*.pt"), None) is not None
