"""Giving back the memory of file-mapped tensors that were read and are not needed any more."""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from pathlib import Path

import torch

MADV_DONTNEED = 4  # Linux


class MappedFiles:
    """The private file mappings of this process: a tensor in one of them was read from a file. None outside Linux."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        if not sys.platform.startswith("linux"):
            return
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            place, access, *_, name = [*line.split(maxsplit=5), ""][:6]
            if access.endswith("p") and name.startswith("/") and not name.startswith("/dev/"):
                start, end = (int(number, 16) for number in place.split("-"))
                self.ranges.append((start, end))
        self.ranges.sort()

    def release(self, tensor: torch.Tensor) -> None:
        """Let the pages under `tensor` go if it lies in a file and was not written to; they can be read again.

        A file's pages count as this process' memory as long as they are mapped. Without this, weights that are
        converted to another number type on reading would be there twice.
        """
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        place = bisect_right(self.ranges, (start, sys.maxsize)) - 1
        if place < 0 or start + size > self.ranges[place][1]:
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_DONTNEED)
