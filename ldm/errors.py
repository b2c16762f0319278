"""The one exception that is shown to people without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the person at the keyboard can mend: one line that says what, where and what to do."""
