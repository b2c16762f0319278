"""Growing: a network for larger images starts from the weights of one for smaller images.

Levels are matched from the innermost one outwards, so a grown network has more levels than its origin (`depths` and
`channels` with new entries in front), or uses some that were left out before (a smaller `skip_stages`). New levels
begin as nothing but resampling: together with the first and last layer, where these fit, the grown network begins by
doing at the lower resolution what it did before.
"""

from __future__ import annotations

import os
import re

import torch
from torch import nn

from ldm.checkpoint import fold_ema, read_state_dict
from ldm.errors import UserError
from ldm.k_diffusion.models.image_v1 import ImageDenoiserModelV1

StateDict = dict[str, torch.Tensor]
BLOCK = re.compile(r"u_net\.(d|u)_blocks\.(\d+)\.")


@torch.no_grad()
def grow(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give `network` the averaged weights of the smaller network in a checkpoint, and say what is new.

    Raises:
        UserError: the file cannot be read or holds no such network, or the networks do not go together.
    """
    if not isinstance(network, ImageDenoiserModelV1):
        raise UserError(f"yaml: grow_from: a {type(network).__name__} cannot be grown; image_v1 networks can")
    old = network_of(fold_ema(read_state_dict(path))[0], path)
    shift = len(network.u_net.d_blocks) - levels_of(old)
    new_levels = range(network.u_net.skip_stages, skipped_of(old) + shift)
    if shift < 0 or network.u_net.skip_stages > skipped_of(old) + shift:
        raise UserError(
            f"yaml: grow_from: '{path}' uses {levels_of(old) - skipped_of(old)} levels, this network only "
            f"{len(network.u_net.d_blocks) - network.u_net.skip_stages}; add levels in front, or lower skip_stages"
        )
    own = network.state_dict()
    taken = {moved(key, shift): value for key, value in old.items() if not unused(key, old)}
    free = ("proj_in.", "proj_out.", "mapping_cond.")  # may have other shapes: then they start anew
    wrong = [k for k, v in taken.items() if not k.startswith(free) and (k not in own or own[k].shape != v.shape)]
    wrong = [k for k in wrong if not k.endswith(".kernel")]
    if wrong:
        key = wrong[0]
        here = list(own[key].shape) if key in own else "none"
        raise UserError(
            f"yaml: grow_from: {len(wrong)} weights of '{path}' do not fit the inner levels of this network, such as "
            f"{key}: {list(taken[key].shape)} there and {here} here"
        )
    fitting = {k: v for k, v in taken.items() if k in own and own[k].shape == v.shape}
    network.load_state_dict(fitting, strict=False)
    if "mapping_cond.weight" in own and "mapping_cond.weight" not in fitting:
        network.mapping_cond.weight.zero_()
    pass_through(network, new_levels)
    anew = [name for name in ("proj_in", "proj_out") if f"{name}.weight" not in fitting]
    said = f"Grown from {path}: {len(new_levels)} new level{'s' * (len(new_levels) != 1)}"
    print(said + (f"; {' and '.join(anew)} start anew" if anew else ""))


def network_of(state: StateDict, path: str | os.PathLike[str]) -> StateDict:
    """The weights of the image_v1 network in a checkpoint, by the network's own names.

    Raises:
        UserError: there is none.
    """
    found = next((key for key in state if "u_net.d_blocks." in key), None)
    if found is None:
        raise UserError(f"yaml: grow_from: '{path}' holds no image_v1 network")
    prefix = found[: found.index("u_net.d_blocks.")]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def levels_of(state: StateDict) -> int:
    """How many levels a network has, by its weights."""
    return 1 + max(int(match[2]) for key in state if (match := BLOCK.match(key)) and match[1] == "d")


def skipped_of(state: StateDict) -> int:
    """How many outermost levels a network leaves out, by its weights: the first one that it uses does not resample."""
    resampling = [int(match[2]) for key in state if (match := BLOCK.match(key)) and key.endswith(".0.kernel")]
    return min(resampling, default=levels_of(state)) - 1


def unused(key: str, state: StateDict) -> bool:
    """Whether `key` is of a level that the network of `state` leaves out."""
    match = BLOCK.match(key)
    if not match:
        return False
    number = int(match[2])
    return (number if match[1] == "d" else levels_of(state) - 1 - number) < skipped_of(state)


def moved(key: str, shift: int) -> str:
    """The name that a weight has in a network with `shift` more levels in front."""
    return re.sub(r"(?<=^u_net\.d_blocks\.)\d+", lambda match: str(int(match[0]) + shift), key)


def pass_through(network: ImageDenoiserModelV1, levels: range) -> None:
    """Make new levels leave what comes through them as it is.

    Residual branches begin as nothing; what is left are the skip connections where channels change: on the way up
    they take what comes from within, not what the way down left behind.
    """
    count = len(network.u_net.d_blocks)
    for level in levels:
        for block in (network.u_net.d_blocks[level], network.u_net.u_blocks[count - 1 - level]):
            for layer in block:
                skip = getattr(layer, "skip", None)
                if isinstance(skip, nn.Conv2d):
                    skip.weight.copy_(torch.eye(*skip.weight.shape[:2])[..., None, None])
