"""Write the weights of a checkpoint anew: averaged, without what only training needs, in half precision.

python scripts/convert.py logs/RUN/checkpoints/last.ckpt model.safetensors --half
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli


def main(argv: Sequence[str]) -> None:
    """Parse the flags, read, write."""
    parser = cli.ArgumentParser(description="Make a checkpoint for sampling from a training checkpoint.")
    parser.add_argument("source", help="a .ckpt or .safetensors file")
    parser.add_argument("target", help="what to write, ending in .ckpt or .safetensors")
    parser.add_argument("--half", action="store_true", help="16-bit weights (noise schedules stay 32-bit)")
    parser.add_argument("--no_ema", action="store_true", help="the plain weights instead of the averaged ones")
    parser.add_argument("--allow_pickle", action="store_true", help="unpickle any .ckpt: it may run any code")
    options = parser.parse_args(argv)

    from ldm.checkpoint import for_inference, read_state_dict, save_checkpoint

    state = for_inference(read_state_dict(options.source, options.allow_pickle), ema=not options.no_ema)
    save_checkpoint(state, options.target, half=options.half)
    size = Path(options.target).stat().st_size / 2**20
    print(f"{options.target}: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} numbers, {size:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
