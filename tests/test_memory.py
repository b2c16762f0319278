"""Freed memory is kept where it is used again, and given back when it is not."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource

import torch

from ldm import memory
from ldm.evaluation.cost import memory as resident

memory.keep_freed()
before = resident("VmRSS")
for _ in range(10):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**26)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
kept = resident("VmRSS") - before
memory.give_back()
print(faults, kept / 2**28, (resident("VmRSS") - before) / 2**28)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what it tests is of Linux with glibc")
def test_a_large_block_is_used_again_and_then_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    faults, kept, left = map(float, done.stdout.split())
    assert faults < 100  # pages that the system had to find; the block has 65,536
    assert 0.9 < kept < 4 and left < 0.1  # blocks
