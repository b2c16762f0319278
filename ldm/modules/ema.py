"""Exponential moving average of a model's trainable weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class LitEma(nn.Module):
    """Shadow copies of the trainable parameters of `model`, kept as buffers.

    State-dict keys are the parameters' names without dots, beside `decay` and `num_updates`, as in CompVis'
    checkpoints. With `use_num_updates` the decay warms up as min(decay, (1 + n) / (10 + n)) after n updates.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
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
            self._updates += 1
            self.num_updates += 1
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
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
