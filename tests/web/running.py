"""The page as people run it: the program in a process of its own, and a real browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG, CKPT = "models/tiny/config.yaml", "models/tiny/model.safetensors"
START = 240  # seconds that a busy machine may need to load everything, or to end
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@dataclass
class Running:
    """A page that is being served."""

    address: str
    outdir: Path
    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        """What the program has written."""
        return self.log.read_text("utf-8", "replace")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(folder: Path, *words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """The page of the tiny model, with its output in `folder`/out; it ends with the block."""
    outdir, log, port = folder / "out", folder / "log.txt", free_port()
    command = [sys.executable, ROOT / "scripts/webui.py", "--outdir", outdir, "--port", port, "--device", "cpu", *words]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env={**os.environ, **(env or {})}, stdout=output, stderr=output
        )
    page = Running(f"http://127.0.0.1:{port}", outdir, process, log)
    try:
        until(lambda: "The page is at" in page.said() or process.poll() is not None, START)
        assert process.poll() is None, page.said()
        yield page
    finally:
        process.terminate()
        process.wait(START)


def until(done: Any, seconds: float, every: float = 0.1) -> Any:
    """Wait until `done()` is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(every)
    return value


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with size and time; what Python and tests write apart."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [
            f for f in folders if f not in ("__pycache__", ".git", ".pytest_cache", ".ruff_cache", ".hypothesis")
        ]
        for name in names:
            path = Path(place) / name
            if path.exists():
                found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def chromium() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browser_page(width: int = 1360, height: int = 980) -> Iterator[Any]:
    """A page of headless Chromium with a new profile; `requested` lists every address that it asked for."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium(), headless=True, args=FLAGS, viewport={"width": width, "height": height}
        )
        context.set_default_timeout(300_000)
        page = context.pages[0]
        page.requested = []
        context.on("request", lambda request: page.requested.append(request.url))
        yield page
        context.close()
