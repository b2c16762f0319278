"""Captions of images: in a text file beside each, in a table of their folder, or made of a label's name."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError

TABLES = ("metadata.jsonl", "metadata.csv")  # looked for in a folder, in this order
CAPTION_COLUMNS = ("caption", "text")


def caption_path(photo: Path) -> Path:
    """Where a photo's own caption is kept."""
    return photo.with_suffix(".txt")


def one_line(text: str) -> str:
    """A caption without line breaks, doubled spaces and spaces at its ends."""
    return " ".join(text.split())


def read_caption(photo: Path) -> str | None:
    """A photo's own caption in one line, None when it has none; an empty file is an empty caption.

    Raises:
        UserError: the file is no text.
    """
    path = caption_path(photo)
    try:
        return one_line(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"caption {path} cannot be read as text: {error}") from None


def pick_caption(fields: Mapping[str, Any], column: str | None, where: str, otherwise: str | None = None) -> str:
    """The caption among a sample's fields: `column`, or else the first of `CAPTION_COLUMNS` that says something.

    Where all that are there are empty, so is the caption; where there is none, it is `otherwise`.

    Raises:
        UserError: there is none, and nothing otherwise.
    """
    values = [fields.get(name) for name in ((column,) if column else CAPTION_COLUMNS)]
    lines = [one_line(value) for value in values if isinstance(value, str)]
    if not lines and otherwise is not None:
        return otherwise
    if not lines:
        raise UserError(f"{where} has no caption ({column or ' or '.join(CAPTION_COLUMNS)})")
    return next(filter(None, lines), "")


def check_template(template: str) -> None:
    """Raise a UserError unless `template` has one place, {}, for a label's name."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise UserError(f"yaml: template is {template!r}; it must hold one {{}} for the label's name")


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object")
    return row


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .csv or .tsv table; a csv's values are strings, and None where a cell is empty.

    Raises:
        UserError: the table is missing, no text, of another kind, or a row of it cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        raise UserError(f"table of captions {path}: its kind must be .jsonl, .csv or .tsv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"table of captions {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"table of captions {path} cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        return [_parse_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        return [{column: value or None for column, value in row.items()} for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def check_filters(filters: Mapping[str, Mapping[str, float]] | None) -> dict[str, tuple[float, float]]:
    """The bounds (least, greatest) of each field that `filters` names, e.g. `{aesthetic: {min: 5}}`.

    Raises:
        UserError: a filter is something other than `min` and `max` with numbers.
    """
    bounds = {}
    for name, limits in (filters or {}).items():
        valid = isinstance(limits, Mapping) and limits and set(limits) <= {"min", "max"}
        if not valid or not all(isinstance(limit, int | float) for limit in limits.values()):
            raise UserError(f"yaml: the filter {name} is {limits!r}; write {name}: {{min: 5}}, {{max: 9}} or both")
        bounds[str(name)] = (limits.get("min", -math.inf), limits.get("max", math.inf))
    return bounds


def passes(fields: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]]) -> bool:
    """Whether every field that `bounds` names is a number within them; a field that is missing is not."""
    for name, (least, greatest) in bounds.items():
        try:
            if not least <= float(fields[name]) <= greatest:
                return False
        except (KeyError, TypeError, ValueError):
            return False
    return True


def pick_size(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (width, height) in pixels that a sample's fields tell, None where they do not."""
    try:
        width, height = (int(fields[name]) for name in ("width", "height"))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def trim(fields: Mapping[str, Any], column: str | None, keep: Sequence[str]) -> dict[str, Any]:
    """A sample's fields that are read later: of a million samples, the others would fill the memory."""
    names = (*((column,) if column else CAPTION_COLUMNS), *keep, "width", "height")
    return {name: fields[name] for name in names if name in fields}


def pick_fields(fields: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """The fields that an item is to hold beside image and caption.

    Raises:
        UserError: one of them is missing.
    """
    for name in names:
        if fields.get(name) is None:
            raise UserError(f"{where} has no field {name}")
    return {name: fields[name] for name in names}
