"""AdamW in channels_last: torch's numbers, without torch's copies, whatever the order in which moments were saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import profile

from ldm.adamw import AdamW

SHAPES = ((8, 16, 3, 3), (8, 4, 1, 1), (16, 8), (8,))


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    drawn = (torch.randn(shape) for shape in SHAPES)
    return [nn.Parameter(last(value)) for value in drawn]


def last(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = last(torch.randn(parameter.shape))
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_torchs(fused: bool) -> None:
    ours, theirs = weights(), weights()
    here, there = AdamW(ours, lr=0.1, fused=fused), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for seed in range(5):
        step(here, ours, seed)
        step(there, theirs, seed)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert a.stride() == b.stride() and here.state[a]["exp_avg"].stride() == a.stride()
        torch.testing.assert_close(here.state[a]["exp_avg_sq"], there.state[b]["exp_avg_sq"])


def test_a_fused_step_copies_nothing() -> None:
    parameters = weights()
    optimizer = AdamW(parameters, fused=True)
    step(optimizer, parameters, 0)
    with profile() as listened:
        optimizer.step()
    assert "aten::clone" not in {event.key for event in listened.key_averages()}


def test_moments_may_have_been_saved_in_another_order_of_memory() -> None:
    whole, parts = weights(), weights()
    uninterrupted, begun = AdamW(whole, fused=True), AdamW(parts, fused=True)
    step(uninterrupted, whole, 0)
    step(begun, parts, 0)
    saved = copy.deepcopy(begun.state_dict())
    for state in saved["state"].values():
        state |= {name: value.contiguous() for name, value in state.items()}
    resumed = AdamW(parts, fused=True)
    resumed.load_state_dict(saved)
    step(uninterrupted, whole, 1)
    step(resumed, parts, 1)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
