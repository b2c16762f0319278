"""Signals that ask a training run to end: they are noted, and heeded where nothing is lost."""

from __future__ import annotations

import signal
import threading
from typing import Any

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(SystemExit):
    """The run saved and ended because of a signal; its exit code is 128 + the signal's number, as shells have it."""


class PicturesAbandoned(Exception):
    """Sample pictures were left unfinished because a signal came."""


class SignalWatch:
    """Remembers the last of the watched signals. After one Ctrl-C, a second ends the process at once."""

    def __init__(self) -> None:
        self.caught = 0

    def begin(self) -> None:
        """Watch from now on, with none caught; a thread beside the main one gets no signals."""
        self.caught = 0
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.caught = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


watch = SignalWatch()  # one a process, as signals are


def abandon_pictures(*_: Any) -> None:
    """A sampler's callback: leave the drawing of sample pictures when a signal has come."""
    if watch.caught:
        raise PicturesAbandoned
