"""What the figures were measured on: the machine, the versions, and the rates that it reaches at its best."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "scipy")
SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices
STREAM = 2**28  # bytes that are copied: more than any cache holds
BUSY = 0.5  # load a core, above which other programs take their share of the time


def describe(device: str) -> str:
    """Processor or GPU, memory, system and versions, in a line."""
    import torch

    return f"{_device(device)}; {_system()}; {', '.join(_versions())}; {torch.get_num_threads()} threads"


def _device(device: str) -> str:
    if device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    info = Path("/proc/cpuinfo")
    words = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in words if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB"


def _system() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return found


def load() -> float:
    """How many programs ran, on average of the last minute, for each core; 0 where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def side_of(device: str) -> int:
    """Of the matrices whose product is timed."""
    return SIDES[device.partition(":")[0]]


def rates(device: str, dtype: str) -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a large copy, both ways counted)."""
    import torch

    side = side_of(device)
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(STREAM, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiply = _best(lambda: torch.mm(a, b, out=product), device)
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # oneDNN's may be faster than MKL's
        multiply = min(multiply, _best(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), device))
    copy = _best(lambda: target.copy_(source), device)
    return 2 * side**3 / multiply, 2 * STREAM / copy


def _best(work: Callable[[], object], device: str, runs: int = 7) -> float:
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
