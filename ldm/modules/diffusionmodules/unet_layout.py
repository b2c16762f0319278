"""How the blocks of a U-Net are numbered: from its yaml, or from weights that nobody has a yaml for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

UNET = "model.diffusion_model."  # where the U-Net lies in a whole model's weights


@dataclass(frozen=True)
class UNetLayout:
    """The parameters of `UNetModel` that say which blocks there are.

    On the way down a level has `num_res_blocks` blocks and, but for the last level, one that downsamples; on the way up
    it has `num_res_blocks + 1`, the last of which upsamples.
    """

    channel_mult: tuple[int, ...]
    num_res_blocks: int
    use_middle_block: bool = True

    @classmethod
    def of_params(cls, params: Mapping[str, Any]) -> UNetLayout:
        """That of `unet_config.params`."""
        return cls(tuple(params["channel_mult"]), params["num_res_blocks"], params.get("use_middle_block", True))

    @classmethod
    def of_weights(cls, state: Mapping[str, Any]) -> UNetLayout | None:
        """That of a whole model's weights by their names and shapes; None for none of Stable Diffusion's kind."""
        inputs, outputs = (_places(state, f"{UNET}{way}_blocks.") for way in ("input", "output"))
        levels = 1 + sum(f"{UNET}input_blocks.{place}.0.op.weight" in state for place in inputs)
        size = len(inputs) // levels  # of a level, its downsampling block included; the very first block counts for one
        firsts = [f"{UNET}input_blocks.{1 + level * size}.0.out_layers.3.weight" for level in range(levels)]
        widths = [state[key].shape[0] for key in firsts if key in state]
        if not inputs or inputs != outputs or len(inputs) != size * levels or len(widths) != levels:
            return None
        first = state[f"{UNET}input_blocks.0.0.weight"].shape[0]
        middle = any(key.startswith(f"{UNET}middle_block.") for key in state)
        return cls(tuple(width // first for width in widths), size - 1, middle)

    @property
    def levels(self) -> int:
        """How many resolutions there are."""
        return len(self.channel_mult)

    def params(self) -> dict[str, Any]:
        """The parameters for `unet_config.params`, as yaml holds them."""
        return asdict(self) | {"channel_mult": list(self.channel_mult)}

    def input_block(self, level: int, i: int) -> str:
        """The name of block i of a level on the way down; that of `num_res_blocks` downsamples."""
        return f"input_blocks.{1 + level * (self.num_res_blocks + 1) + i}"

    def output_block(self, level: int, i: int) -> str:
        """The name of block i of a level on the way up."""
        return f"output_blocks.{(self.levels - 1 - level) * (self.num_res_blocks + 1) + i}"


def _places(state: Mapping[str, Any], prefix: str) -> set[int]:
    """The numbers that come after `prefix` in the keys that begin with it."""
    return {int(key.removeprefix(prefix).partition(".")[0]) for key in state if key.startswith(prefix)}
