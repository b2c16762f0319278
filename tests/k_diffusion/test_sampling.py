"""k-diffusion's samplers: reference numbers, orders where the ODE is known, the right noise, whatever the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from ldm.errors import UserError
from ldm.k_diffusion import sampling
from ldm.k_diffusion.schedules import vp_between
from ldm.samplers import SAMPLERS
from tests.goldens.fill import data

GOLDENS = np.load("tests/goldens/k_diffusion.npz")
MEAN, SPREAD = 0.7, 0.5  # of the Gaussian data
NAMES = sorted(name.removeprefix("sample_") for name in sampling.__all__ if name.startswith("sample_"))
BETWEEN_TWO = ("dpm_fast", "dpm_adaptive")


def takes(name: str, setting: str) -> bool:
    return setting in inspect.signature(getattr(sampling, f"sample_{name}")).parameters


STOCHASTIC = [name for name in NAMES if takes(name, "eta")]
CHURNING = [name for name in NAMES if takes(name, "s_churn")]


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact D(x, sigma) of data N(MEAN, SPREAD^2)."""
    variance = sigma.view(-1, *([1] * (x.ndim - 1))) ** 2
    return (SPREAD**2 * x + variance * MEAN) / (SPREAD**2 + variance)


def exact(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Where the probability flow ODE leads to: x keeps its place in a Gaussian whose width changes."""
    return MEAN + (x - MEAN) * ((SPREAD**2 + end**2) / (SPREAD**2 + start**2)) ** 0.5


def even(n: int, start: float, end: float) -> torch.Tensor:
    """n steps in log sigma, in float64, that do not end at 0."""
    return torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp()


def sample(name: str, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, **settings: Any) -> Any:
    """Any sampler over all of the levels, quietly."""
    run = getattr(sampling, f"sample_{name}")
    if name in BETWEEN_TWO:
        ends = float(min(s for s in sigmas if s > 0)), float(sigmas[0])
        count = {"n": len(sigmas) - 1} if name == "dpm_fast" else {}
        return run(model, x, *ends, **count, disable=True, **settings)
    return run(model, x, sigmas, disable=True, **settings)


# ---- against upstream ------------------------------------------------------------------------------------------


def toy(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser that the reference numbers were made with."""
    s = sigma.view(-1, 1, 1, 1)
    return x * 0.25 / (s**2 + 0.25) + 0.3 * torch.tanh(x / (1 + s)) * s / (1 + s)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms"])
def test_outputs_of_the_original(name: str) -> None:
    x = sample(name, toy, data("kx", (2, 3, 8, 8)) * 10, sampling.get_sigmas_karras(12, 0.05, 10.0))
    np.testing.assert_allclose(x, GOLDENS[f"sample_{name}"], atol=1e-5, rtol=1e-4)


def test_schedules_of_the_original() -> None:
    np.testing.assert_allclose(sampling.get_sigmas_karras(10, 0.1, 10.0), GOLDENS["karras10"], rtol=1e-5)
    np.testing.assert_allclose(sampling.get_sigmas_vp(10), GOLDENS["vp10"], rtol=1e-3)  # float32 at e^x - 1


# ---- schedules -------------------------------------------------------------------------------------------------

LOW, HIGH = st.floats(1e-3, 0.9), st.floats(1.1, 1e3)


@given(n=st.integers(1, 60), low=LOW, high=HIGH, rho=st.floats(0.5, 2.5))
def test_schedules_fall_from_the_highest_level_to_the_lowest_and_0(n: int, low: float, high: float, rho: float) -> None:
    for sigmas in (
        sampling.get_sigmas_karras(n, low, high, 4 * rho),
        sampling.get_sigmas_exponential(n, low, high),
        sampling.get_sigmas_polyexponential(n, low, high, rho),
        sampling.get_sigmas_vp(n, *vp_between(low, high)),
    ):
        assert sigmas.shape == (n + 1,) and sigmas.dtype == torch.float32 and sigmas[-1] == 0
        assert float(sigmas[0]) == pytest.approx(high, rel=1e-5)
        assert n == 1 or float(sigmas[-2]) == pytest.approx(low, rel=1e-4)
        assert (sigmas.diff() < 0).all()  # none is repeated: no step is idle


@given(n=st.integers(3, 60), low=LOW, high=HIGH, rho=st.floats(0.5, 2.5))
def test_schedules_are_even_where_they_say_so(n: int, low: float, high: float, rho: float) -> None:
    beta_d, beta_min, eps_s = vp_between(low, high)
    ramp, t = np.linspace(1, 0, n), np.linspace(1, eps_s, n)
    for sigmas, expected in (
        (sampling.get_sigmas_karras(n, low, high, 4 * rho), np.interp(
            ramp, [0, 1], [low ** (1 / (4 * rho)), high ** (1 / (4 * rho))]) ** (4 * rho)),
        (sampling.get_sigmas_exponential(n, low, high), np.geomspace(high, low, n)),
        (sampling.get_sigmas_polyexponential(n, low, high, rho), low * (high / low) ** (ramp**rho)),
        (sampling.get_sigmas_vp(n, beta_d, beta_min, eps_s), np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t))),
    ):  # fmt: skip
        np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampling.get_sigmas_karras(0, 0.1, 1.0), "sampling steps: 0: must be at least 1"),
        (lambda: sampling.get_sigmas_vp(0), "sampling steps: 0"),
        (lambda: sampling.get_sigmas_karras(5, 0.0, 1.0), "sigma_min 0, sigma_max 1: must be above 0"),
        (lambda: sampling.get_sigmas_exponential(5, 2.0, 1.0), "the second the larger"),
        (lambda: sampling.get_sigmas_polyexponential(5, 0.1, 1.0, -1.0), "rho -1: must be above 0"),
        (lambda: sampling.get_sigmas_polyexponential(60, 0.1, 1.0, 10.0), "some levels of noise are the same"),
    ],
)
def test_impossible_schedules(make: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# ---- orders ----------------------------------------------------------------------------------------------------

ORDERS = [
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    *(("lms", {"order": order}, order) for order in (1, 2, 3, 4)),
    ("dpm_fast", {}, 3),
    ("dpmpp_2m", {}, 2),
    ("euler_ancestral", {"eta": 0.0}, 1),
    ("dpm_2_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0, "r": 1 / 3}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 3),
]


@pytest.mark.parametrize(("name", "settings", "order"), ORDERS, ids=str)
def test_halving_the_step_divides_the_error_as_the_order_says(name: str, settings: dict[str, Any], order: int) -> None:
    """From far out, where multistep methods' first steps of lower orders cost nothing: there D is nearly constant."""
    start, end = 1000.0, 0.05
    x = torch.linspace(-2000, 2000, 7, dtype=torch.float64)[:, None]
    per_step = 3 if name == "dpm_fast" else 1
    errors = []
    for n in (64, 128, 256):
        made = sample(name, gaussian, x, even(n * per_step + (2 if per_step == 3 else 0), start, end), **settings)
        errors.append(float((made - exact(x, start, end)).abs().max()))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert order - 0.4 < rates[-1] < order + 0.8, (errors, rates)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_keep_to_the_tolerance(order: int) -> None:
    x = torch.linspace(-20, 20, 7, dtype=torch.float64)[:, None]
    errors, counts = [], []
    for tolerance in (0.05, 0.005, 0.0005):
        calls = []
        made, info = sample(
            "dpm_adaptive", lambda x, s: calls.append(s) or gaussian(x, s), x, even(1, 10.0, 0.05),  # noqa: B023
            order=order, rtol=tolerance, atol=tolerance / 6, return_info=True,
        )  # fmt: skip
        assert info["nfe"] == len(calls) and info["steps"] == info["n_accept"] + info["n_reject"]
        errors.append(float((made - exact(x, 10.0, 0.05)).abs().max()))
        counts.append(info["nfe"])
    assert errors[0] > errors[1] > errors[2] and counts[0] < counts[1] < counts[2]
    assert errors[0] < 0.1 and errors[2] < 0.01


@given(i=st.integers(0, 8), order=st.integers(1, 5))
def test_multistep_weights_are_the_integrals_of_lagranges_polynomials(i: int, order: int) -> None:
    t = sampling.get_sigmas_karras(9, 0.05, 20.0).tolist()
    if order - 1 > i:
        with pytest.raises(ValueError, match="too high"):
            sampling.linear_multistep_coeff(order, t, i, 0)
        return
    for j in range(order):
        points = [t[i - k] for k in range(order) if k != j]
        value, _ = integrate.quad(lambda tau: math.prod((tau - p) / (t[i - j] - p) for p in points), t[i], t[i + 1])  # noqa: B023
        assert sampling.linear_multistep_coeff(order, t, i, j) == pytest.approx(value, rel=1e-6, abs=1e-9)


# ---- noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"eta": 1.0}) for name in STOCHASTIC),
        *((name, {"eta": 0.5}) for name in ("euler_ancestral", "dpm_fast", "dpmpp_sde", "dpmpp_3m_sde")),
        ("dpmpp_2m_sde", {"eta": 1.0, "solver_type": "heun"}),
        *((name, {"s_churn": 8.0, "s_tmax": 30.0}) for name in CHURNING),
    ],
    ids=str,
)
def test_stochastic_samplers_have_the_datas_mean_and_variance(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    count, start = 8000, 40.0
    x = MEAN + (SPREAD**2 + start**2) ** 0.5 * torch.randn(1, count)
    steps = 500 if name.startswith("euler") else 40
    made = sample(name, gaussian, x, sampling.get_sigmas_karras(steps, 0.02, start), **settings)
    assert float(made.mean()) == pytest.approx(MEAN, abs=4 * SPREAD / count**0.5)
    assert float(made.std()) == pytest.approx(SPREAD, rel=0.04)


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "s_noise")])
def test_the_noise_is_fresh_and_its_factor_counts(name: str) -> None:
    x = 40.0 * data("start", (1, 1000))
    churn = {"s_churn": 20.0} if name in CHURNING else {"eta": 1.0}
    ends = [
        sample(name, gaussian, x, sampling.get_sigmas_karras(10, 0.02, 40.0), **churn, **more)
        for more in ({}, {}, {"s_noise": 0.0}, {"s_noise": 0.0})
    ]
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], ends[3]) and float(ends[2].std()) < float(ends[0].std())


@given(sigma=st.floats(0.01, 100), ratio=st.floats(0.0, 0.999), eta=st.floats(0.0, 1.0))
def test_an_ancestral_step_arrives_at_its_level(sigma: float, ratio: float, eta: float) -> None:
    down, up = sampling.get_ancestral_step(sigma, ratio * sigma, eta)
    assert down**2 + up**2 == pytest.approx((ratio * sigma) ** 2)
    assert up == pytest.approx(eta * ratio * sigma * (1 - ratio**2) ** 0.5) and down >= 0


def test_a_brownian_path_does_not_depend_on_where_it_is_asked() -> None:
    x = torch.zeros(2, 4, 8, 8)

    def path() -> sampling.BrownianTreeNoiseSampler:
        return sampling.BrownianTreeNoiseSampler(x, 0.03, 14.6, seed=[5, 6])

    def increment(noise: sampling.BrownianTreeNoiseSampler, a: float, b: float) -> torch.Tensor:
        return noise(a, b) * abs(a - b) ** 0.5

    whole, parts = path(), path()
    for a, b in [(14.6, 3.0), (3.0, 0.5), (0.5, 0.03)]:  # in two steps, and backwards
        middle = (a + b) / 3
        halves = increment(parts, a, middle) + increment(parts, middle, b)
        torch.testing.assert_close(increment(whole, a, b), halves, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(path()(3.0, 0.5), whole(3.0, 0.5))
    torch.testing.assert_close(whole(0.5, 3.0), -whole(3.0, 0.5))
    alone = sampling.BrownianTreeNoiseSampler(x[:1], 0.03, 14.6, seed=[6])
    torch.testing.assert_close(alone(3.0, 0.5), whole(3.0, 0.5)[1:])
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        sampling.BrownianTreeNoiseSampler(x, 0.03, 14.6, seed=[1, 2, 3])


def test_brownian_noise_is_normal() -> None:
    noise = sampling.BrownianTreeNoiseSampler(torch.zeros(1, 10000), torch.tensor(0.03), torch.tensor(14.6), seed=3)
    steps = [noise(a, b) for a, b in [(14.6, 9.0), (9.0, 1.0), (1.0, 0.03)]]
    for step in steps:
        assert float(step.mean()) == pytest.approx(0.0, abs=0.04) and float(step.std()) == pytest.approx(1.0, rel=0.04)
    assert float((steps[0] * steps[1]).mean()) == pytest.approx(0.0, abs=0.04)
    by_log = sampling.BrownianTreeNoiseSampler(torch.zeros(1, 10000), 0.03, 14.6, seed=3, transform=torch.log)
    assert float(by_log(9.0, 1.0).std()) == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_one_seed_leads_to_one_picture_at_any_number_of_steps(name: str) -> None:
    x = 20.0 * data("start", (1, 100))

    def end(n: int, seed: int) -> torch.Tensor:
        noise = sampling.BrownianTreeNoiseSampler(x, 0.05, 20.0, seed=seed)
        return sample(name, gaussian, x, sampling.get_sigmas_karras(n, 0.05, 20.0), noise_sampler=noise)

    near, other = (float((end(40, 1) - made).square().mean().sqrt()) for made in (end(20, 1), end(40, 2)))
    assert near < 0.4 * other and other > SPREAD


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpm_adaptive"])
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    sigmas = sampling.get_sigmas_karras(8, 0.05, 20.0)

    def draw(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = 20.0 * torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
        settings: dict[str, Any] = {"s_churn": 5.0} if name in CHURNING else {}
        if takes(name, "noise_sampler"):
            brownian = name.endswith("sde")
            settings["noise_sampler"] = (
                sampling.BrownianTreeNoiseSampler(x, 0.05, 20.0, generators)
                if brownian
                else sampling.default_noise_sampler(x, generators)
            )
        return sample(name, toy, x, sigmas, **settings)

    together = draw([3, 7, 9])
    torch.testing.assert_close(together[1:2], draw([7]), atol=0, rtol=0)
    assert not torch.equal(together[0], together[1])


def test_noise_of_one_seed_and_of_torchs_generator() -> None:
    x = torch.zeros(2, 4)
    torch.manual_seed(3)
    expected = torch.randn(2, 4)
    torch.manual_seed(3)
    torch.testing.assert_close(sampling.default_noise_sampler(x)(1.0, 0.5), expected)
    torch.testing.assert_close(sampling.default_noise_sampler(x, 3)(1.0, 0.5), expected)
    rows = sampling.default_noise_sampler(x, [3, 4])(1.0, 0.5)
    torch.testing.assert_close(rows[1:], sampling.default_noise_sampler(x[1:], [4])(1.0, 0.5))


# ---- what all have in common -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_callbacks_calls_and_what_the_model_is_given(name: str) -> None:
    calls, told = [], []
    sigmas = sampling.get_sigmas_karras(6, 0.1, 10.0)

    def model(x: torch.Tensor, sigma: torch.Tensor, extra: int) -> torch.Tensor:
        assert extra == 5 and sigma.shape == (2,) and (sigma > 0).all()
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    sample(name, model, 10.0 * data("x", (2, 3)), sigmas, extra_args={"extra": 5}, callback=told.append)
    assert calls[0] == pytest.approx(10.0) and min(calls) >= 0.099
    assert all({"x", "i", "sigma", "sigma_hat", "denoised"} <= set(info) for info in told)
    assert [info["i"] for info in told] == list(range(len(told)))
    choice = next(c for c in SAMPLERS.values() if c.settings.get("sampler") == name)
    if choice.evaluations is not None:
        assert len(calls) == choice.evaluations(6)
    if name not in BETWEEN_TWO:
        assert [float(info["sigma"]) for info in told] == pytest.approx(sigmas[:-1].tolist())
        torch.testing.assert_close(told[-1]["denoised"], gaussian(told[-1]["x"], told[-1]["sigma"].expand(2)))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BETWEEN_TWO])
def test_an_idle_step_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="sigmas: 1 is repeated at place 2"):
        sample(name, gaussian, torch.zeros(1, 2), torch.tensor([5.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "lms", "dpmpp_2m"])
def test_the_ode_can_be_followed_backwards(name: str) -> None:
    x = data("x", (1, 50)).double()
    up = sample(name, gaussian, x, even(200, 0.05, 10.0))
    torch.testing.assert_close(up, exact(x, 0.05, 10.0), rtol=0.05, atol=0.05)


def test_a_slope_takes_levels_for_all_or_each() -> None:
    x, denoised = data("x", (2, 3, 4, 4)), data("y", (2, 3, 4, 4))
    each = sampling.to_d(x, torch.tensor([2.0, 4.0]), denoised)
    torch.testing.assert_close(each[1], (x[1] - denoised[1]) / 4.0)
    torch.testing.assert_close(sampling.to_d(x, 2.0, denoised)[0], each[0])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: sampling.sample_dpm_fast(gaussian, x, 1.0, 0.1, 5, disable=True), "must be above 0 and rise"),
        (lambda x: sampling.sample_dpm_adaptive(gaussian, x, 0.1, 1.0, order=4), "order 4: must be 2 or 3"),
        (lambda x: sampling.sample_dpmpp_2m_sde(gaussian, x, x[0], solver_type="euler"), "'euler' is none of midpoint"),
    ],
)
def test_what_cannot_be_is_said(run: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(torch.zeros(1, 2))
