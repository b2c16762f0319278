"""The finished trials of a study: a JSON file each, made anew when anything that it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ldm.util import atomic_path


def digests(files: Mapping[str, str | Path]) -> dict[str, str]:
    """`<name>_sha256` of files, for a record's settings: a run of another file is another run."""
    return {f"{name}_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in files.items()}


def spread(values: Sequence[float], form: str = ".2f", factor: float = 1.0) -> str:
    """Mean and standard deviation of `factor` times the values; of one alone, itself."""
    average = f"{factor * mean(values):{form}}"
    return f"{average} ± {factor * stdev(values):{form.lstrip('+')}}" if len(values) > 1 else average


@dataclass(frozen=True)
class Records:
    """The records in a folder; each holds the settings under which it was made."""

    folder: Path

    def kept(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record `name`, if it was made under these settings."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["settings"] == settings else None

    def keep(self, name: str, settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        """Write a record, whole or not at all, and return it with its settings."""
        whole = {**record, "settings": dict(settings)}
        with atomic_path(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return whole


def write_table(folder: str | os.PathLike[str], text: str) -> None:
    """A study's table.md, whole or not at all."""
    with atomic_path(Path(folder) / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
