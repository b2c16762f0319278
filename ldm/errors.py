"""The one exception that is shown to people without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the person at the keyboard can mend: one line that says what, where and what to do.

    From a loader process torch brings it back with that process's traceback in its text; it still reads as one line.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if not text.startswith(f"Caught {UserError.__name__} in DataLoader worker"):
            return text
        return text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
