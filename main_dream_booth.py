"""Teach a model a new subject from a few photos: by adapters, LoRA, a new word, or the networks themselves.

    python main_dream_booth.py --base configs/sd-inject-dreambooth/attn2o-ffni.yaml -t \\
        --actual_resume models/ldm/stable-diffusion-v1/model.ckpt -n my-dog --gpus 0, \\
        --data_root photos/dog --reg_data_root photos/dogs --class_word dog --scale_lr False
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm import cli

_LAZY = {"DataModuleFromConfig": "ldm.data.dreambooth", "ImageLogger": "ldm.callbacks"}


def __getattr__(name: str) -> object:
    """`main_dream_booth.DataModuleFromConfig` and `.ImageLogger`, which yaml files name, imported when asked for."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'main_dream_booth' has no attribute '{name}'")


def main(argv: Sequence[str]) -> None:
    """Parse the flags and train."""
    from ldm.personalize import parser, train

    train(parser().parse_intermixed_args(argv))


if __name__ == "__main__":
    cli.run(main)
