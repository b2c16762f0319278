"""Diffusion in the terms of Karras et al. (2022): training, samplers and wrappers, under k-diffusion's names.

`x = x_0 + sigma * noise`, and every model is a denoiser `D(x, sigma[B]) -> x_0`.
"""

from __future__ import annotations

from types import ModuleType

MODULES = ("augmentation", "config", "external", "gns", "likelihood", "models", "sampling")


def __getattr__(name: str) -> ModuleType:
    """Modules as attributes, as upstream's `import k_diffusion as K; K.sampling.sample_euler`, imported then."""
    if name not in MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return import_module(f"{__name__}.{name}")
