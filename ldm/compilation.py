"""Compiling the blocks of a U-Net (`--compile`), for GPUs; the pictures are the same but for rounding."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules.adapters import AdaptableBlock

COMPILERS = ("g++", "clang++", "c++")  # one of which torch.compile calls, on GPUs too
VARIANTS = 128  # of a kind of block that may be compiled: Stable Diffusion's 38 have 18 shapes, for one picture size


def compile_blocks(unet: nn.Module, backend: str = "inductor", fullgraph: bool = False) -> None:
    """Have every residual and transformer block compiled when it is first called; weights and names stay as they are.

    Block by block because that is quicker than the whole network: blocks of one shape share what was compiled. Other
    sizes of pictures, batches and adapters are compiled anew when they come.

    Args:
        backend: of torch.compile. fullgraph: raise where a block would be compiled in pieces.

    Raises:
        UserError: there is no compiler, or the network has no such blocks.
    """
    blocks = [module for module in unet.modules() if isinstance(module, AdaptableBlock)]
    if not blocks:
        raise UserError(f"--compile: {type(unet).__name__} has no blocks that are compiled; leave the flag out")
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", COMPILERS[0]), *COMPILERS))):
        raise UserError(
            "--compile: torch needs a C++ compiler for it and finds none; install g++ or leave the flag out"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(backend=backend, fullgraph=fullgraph, dynamic=False)
