"""AdamW for weights in channels_last, whose fused form torch does not handle well on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter, 2019), with fused steps that neither copy nor mix up numbers.

    The fused step on a CPU takes weights, gradients and moments as they lie in memory. So moments that a checkpoint
    holds in another order than the weights, such as CompVis', are brought into theirs; torch would pair wrong numbers
    without a word. And it first makes a contiguous copy of such gradients, which takes longer than the step and is not
    used; views spare it that.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for weight, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                    state[name] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        if group["fused"]:
            *numbers, _ = lists  # the last has the counts of steps
            for tensors in numbers:
                tensors[:] = map(as_it_lies, tensors)
        return has_complex


def as_it_lies(value: Tensor) -> Tensor:
    """A contiguous view of what is in channels_last on a CPU; what is not, as it is."""
    last = value.device.type == "cpu" and value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return value.permute(0, 2, 3, 1) if last else value
