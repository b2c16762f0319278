"""Train an autoencoder or a diffusion model that yaml files describe.

python main.py --base configs/tiny/autoencoder.yaml -t --scale_lr False
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm import cli

_LAZY = {"DataModuleFromConfig": "ldm.data.module", "ImageLogger": "ldm.callbacks"}


def __getattr__(name: str) -> object:
    """`main.DataModuleFromConfig` and `main.ImageLogger`, which yaml files name, without their import at --help."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'main' has no attribute '{name}'")


def main(argv: Sequence[str]) -> None:
    """Parse the flags and train."""
    from ldm import training
    from ldm.run import add_flags, read_run

    parser = cli.ArgumentParser(description="Train an autoencoder or a diffusion model from yaml files.")
    add_flags(parser)
    options = parser.parse_intermixed_args(argv)
    training.train(read_run(options))


if __name__ == "__main__":
    cli.run(main)
