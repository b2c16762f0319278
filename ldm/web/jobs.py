"""One worker and its queue: jobs go on when the page that asked for them is closed. Imports nothing heavy."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ldm.errors import UserError

KEPT = 20  # jobs that are over and still known
OVER = ("done", "stopped", "failed")


class JobStopped(Exception):
    """Raised inside a job that somebody stopped; it may say what is left of it."""


@dataclass
class Job:
    """Something that takes a while. Its own `run` does it, and says on the way how far it is.

    Args:
        title: what people see of it. run: called by the worker with the job; what it returns is said at its end.

    Attributes:
        state: waiting, running, done, stopped or failed. line: how far it is, or how it ended.
        done: its share that is over, in [0, 1]. preview: a JPEG or PNG of what is being made.
        results: names of finished pictures, or of what a training made. losses: (step, loss) of a training.
        samples: (step, JPEG) of a training.
    """

    title: str
    run: Callable[[Job], str | None]
    kind: str = "picture"
    number: int = 0
    state: str = "waiting"
    line: str = ""
    done: float = 0.0
    preview: bytes = b""
    results: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    samples: list[tuple[int, bytes]] = field(default_factory=list)
    stop_now: bool = False
    stop_after_picture: bool = False
    changed: Callable[[], Any] = lambda: None

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in OVER

    def say(self, line: str, done: float | None = None) -> None:
        """Tell how far it is."""
        self.line, self.done = line, self.done if done is None else min(1.0, max(0.0, done))
        self.changed()

    def heed(self, picture_done: bool = False) -> None:
        """Raise JobStopped when it should stop here."""
        if self.stop_now or (picture_done and self.stop_after_picture):
            raise JobStopped


class Jobs:
    """A queue and the one thread that works through it, in order.

    `version` grows whenever anything about any job has changed. Any thread may call any method.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.version = 0
        self.current: Job | None = None
        self.waiting: deque[Job] = deque()
        self.past: deque[Job] = deque(maxlen=KEPT)
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """Raise UserError when the queue is full; to be called before anything is written for a job."""
        if len(self.waiting) >= self.max_queue:
            raise UserError(f"{self.max_queue} jobs are waiting already; try again when some are done")

    def submit(self, job: Job) -> int:
        """Put a job into the queue; returns how many are before it.

        Raises:
            UserError: the queue is full.
        """
        with self._wake:
            self.check_room()
            job.number, job.changed = next(self._numbers), self._count
            before = len(self.waiting) + (self.current is not None)
            self.waiting.append(job)
            self.version += 1
            self._wake.notify()
            return before

    def stop(self, after_picture: bool = False) -> None:
        """Stop the job that is running, at once or after its present picture."""
        with self._lock:
            if self.current is not None:
                self.current.stop_after_picture |= after_picture
                self.current.stop_now |= not after_picture
                self.version += 1

    def clear(self) -> None:
        """Take all waiting jobs out of the queue."""
        with self._lock:
            for job in self.waiting:
                job.state, job.line = "stopped", "taken out of the queue"
            self.waiting.clear()
            self.version += 1

    def latest(self, kind: str) -> Job | None:
        """The job of a kind that is running, or else the last one that was."""
        with self._lock:
            begun = [*self.past, *([self.current] if self.current else [])]
        return next((job for job in reversed(begun) if job.kind == kind), None)

    def close(self, seconds: float = 60.0) -> None:
        """Stop everything, and wait until the present job has put its things in order."""
        self.clear()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self.stop()
        self._thread.join(seconds)

    def _count(self) -> None:
        with self._lock:
            self.version += 1

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self.waiting and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                job = self.current = self.waiting.popleft()
                job.state = "running"
                self.version += 1
            began = time.monotonic()
            state, line = _outcome(job)
            with self._lock:
                job.state, job.line, job.preview = state, line, b""
                if state == "done":
                    job.done, job.line = 1.0, f"done in {time.monotonic() - began:.0f} s{line and f'; {line}'}"
                self.current = None
                self.past.append(job)
                self.version += 1


def _outcome(job: Job) -> tuple[str, str]:
    """Run a job; how it ended, and in which words."""
    try:
        return "done", job.run(job) or ""
    except JobStopped as stop:
        return "stopped", str(stop) or "stopped"
    except UserError as error:
        return "failed", str(error)
    except Exception:  # of whatever kind: the worker must live on
        traceback.print_exc(file=sys.stderr)
        return "failed", "something went wrong that should not have; the program's own output says what"
