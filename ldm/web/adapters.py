"""Adapters on the page: which there are. `ldm.artefacts` puts them into the model, which stays loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError


@dataclass(frozen=True)
class Shelf:
    """The adapters that people can choose by name: those that were trained here, and those of other folders.

    Args:
        own: the folder in which adapters that were trained here lie, each a directory.
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

    def find(self, name: str) -> Path:
        """Raises UserError where there is none of that name (any more)."""
        if name not in (known := self.all()):
            raise UserError(f"adapter '{name}': it is not here any more; choose another")
        return known[name]

    @staticmethod
    def _in(place: Path) -> list[Path]:
        if is_adapter(place):
            return [place]
        return [path for path in place.iterdir() if is_adapter(path)] if place.is_dir() else []


def is_adapter(path: Path) -> bool:
    """Whether that is an adapter directory or a file of LoRA, a word or weights, by its name and content."""
    return path.suffix == ".safetensors" if path.is_file() else next(path.glob("*.pt"), None) is not None
