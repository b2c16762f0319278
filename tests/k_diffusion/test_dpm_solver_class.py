"""DPM-Solver's single steps: their orders on a Gaussian whose ODE is known, and what they ask the network."""

import numpy as np
import pytest
import torch

from ldm.k_diffusion.dpm_solver_class import DPMSolver
from ldm.k_diffusion.sampling import sample_dpm_adaptive, sample_dpm_fast
from tests.goldens.fill import data
from tests.k_diffusion.test_sampling import exact, gaussian

X = 10 * data("x", (4, 3)).double()


def at(sigma):
    return -torch.tensor(sigma, dtype=torch.float64).log()


@pytest.mark.parametrize("order, shares", [
    (1, {}), (2, {}), (2, {"r1": 0.8}), (3, {}), (3, {"r1": 0.5}),
])  # fmt: skip
def test_a_steps_error_falls_as_its_order_says(order, shares):
    errors = []
    start, h = 0.5, 0.2  # where the denoised x changes most
    for end in (start * np.exp(-h), start * np.exp(-h / 2)):
        calls = []
        solver = DPMSolver(gaussian, eps_callback=lambda: calls.append(1))  # noqa: B023
        step = getattr(solver, f"dpm_solver_{order}_step")
        made, cache = step(X, at(start), at(end), **shares)
        assert len(calls) == order and list(cache)[-1] == "eps"
        again, _ = step(X, at(start), at(end), **shares, eps_cache=cache)
        assert torch.equal(made, again) and len(calls) == order  # all was remembered
        errors.append(float((made - exact(X, start, end)).abs().max()))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.25), errors


def test_ways_of_many_steps_are_the_samplers():
    calls, told = [], []

    def model(x, sigma, extra):
        assert extra == 5
        return gaussian(x, sigma)

    solver = DPMSolver(model, {"extra": 5}, lambda: calls.append(1), told.append)
    made = solver.dpm_solver_fast(X, at(10.0), at(0.05), 8)
    torch.testing.assert_close(made, sample_dpm_fast(gaussian, X, 0.05, 10.0, 8, disable=True))
    assert len(calls) == 8 and [info["i"] for info in told] == [0, 1, 2] and told[0]["t"] == pytest.approx(at(10.0))
    made, info = solver.dpm_solver_adaptive(X, at(10.0), at(0.05), 2, 0.01, 0.001)
    expected = sample_dpm_adaptive(gaussian, X, 0.05, 10.0, disable=True, order=2, rtol=0.01, atol=0.001)
    torch.testing.assert_close(made, expected)
    assert info["nfe"] == len(calls) - 8
    with pytest.raises(ValueError, match="must be above 0 and rise"):
        solver.dpm_solver_fast(X, at(0.05), at(10.0), 8)
