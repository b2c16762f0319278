"""Exponential moving average of a model's trainable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ldm.errors import UserError


@dataclass(frozen=True)
class InverseWarmUp:
    """A decay that rises as 1 - (1 + n / inv_gamma) ** -power with the number n of updates before.

    With inv_gamma and power of 1 the average is over all weights so far, evenly. A power of 2/3 reaches 0.999 at 31,600
    steps and 0.9999 at a million; 3/4 reaches them at 10,000 and 215,400.

    Args:
        inv_gamma, power: how fast it rises.
        min_value, max_value: between which it is kept. start_at: until then n counts as 0.

    Raises:
        UserError: a number is out of its range.
    """

    inv_gamma: float = 1.0
    power: float = 1.0
    min_value: float = 0.0
    max_value: float = 1.0
    start_at: int = 0

    def __post_init__(self) -> None:
        for name, least in (("inv_gamma", 1e-9), ("power", 0), ("min_value", 0), ("max_value", 0), ("start_at", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise UserError(f"yaml: ema_config: {name} is {value!r}; it must be a number of at least {least:g}")
        if not self.min_value <= self.max_value <= 1:
            raise UserError("yaml: ema_config: min_value must be at most max_value, and that at most 1")

    def __call__(self, updates: int) -> float:
        """The decay of the update that comes after `updates` others."""
        value = 1 - (1 + max(0, updates - self.start_at) / self.inv_gamma) ** -self.power
        return min(self.max_value, max(self.min_value, value))


def usual_warm_up(updates: int) -> float:
    """CompVis' bound on the decay, (1 + n) / (10 + n) at the n-th update, after `updates` others."""
    return (2 + updates) / (11 + updates)


class LitEma(nn.Module):
    """Shadow copies of the trainable parameters of `model`, kept as buffers.

    State-dict keys are the parameters' names without dots, beside `decay` and `num_updates`, as in CompVis'
    checkpoints. With `use_num_updates` the decay warms up: it is at most what `warm_up` says.

    Args:
        warm_up: the most that the decay may be at an update, from the number of updates before it.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_updates: bool = True,
        warm_up: Callable[[int], float] = usual_warm_up,
    ) -> None:
        super().__init__()
        self.warm_up = warm_up
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA decay must lie in [0, 1], not {decay}")
        self.m_name2s_name: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        self._updates: int | None = None
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow = name.replace(".", "")
                self.m_name2s_name[name] = shadow
                self.register_buffer(shadow, parameter.clone().detach())
        self.collected_params: list[torch.Tensor] = []

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._updates = None

    def _pairs(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        buffers = dict(self.named_buffers())
        named = {n: p for n, p in model.named_parameters() if n in self.m_name2s_name}
        return [buffers[self.m_name2s_name[n]] for n in named], [p.data for p in named.values()]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the shadows towards the weights of `model`: shadow += (1 - decay) * (weight - shadow)."""
        if self._updates is None:  # one read from the device after construction or loading, none per step
            self._updates, self._decay = int(self.num_updates), float(self.decay)
        decay = self._decay
        if self._updates >= 0:
            decay = min(decay, self.warm_up(self._updates))
            self._updates += 1
            self.num_updates += 1
        shadows, weights = self._pairs(model)
        torch._foreach_lerp_(shadows, weights, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into `model`."""
        shadows, weights = self._pairs(model)
        torch._foreach_copy_(weights, shadows)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the present weights for `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put back what `store` remembered."""
        for saved, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.data.copy_(saved)
        self.collected_params = []
