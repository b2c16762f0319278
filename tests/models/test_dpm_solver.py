"""DPM-Solver(++) against an exactly solvable model, diffusers' schedulers and the original's picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.sampler import ALGORITHMS, METHODS
from ldm.models.diffusion.dpm_solver.solver import Solver, clipped
from ldm.models.diffusion.dpm_solver.spacing import SPACINGS, ContinuousTime, Point, singlestep_orders
from tests.goldens.fill import data
from tests.models.toys import BETAS, GOLDENS, QUIET, X_T, C, Model, assert_golden, run, toy

SPREAD = 0.5  # of the data in the solvable model: Gaussian, so the prediction is linear in x
TIME = ContinuousTime(0.5 * torch.log(torch.cumprod(1 - BETAS, 0)).numpy())


def std(point: Point) -> float:
    return float(np.sqrt((point.alpha * SPREAD) ** 2 + point.sigma**2))


def exact(x: torch.Tensor, start: Point, end: Point) -> torch.Tensor:
    """The ODE's solution: x keeps its place in the Gaussian, whose width changes."""
    return x * (std(end) / std(start))


def gaussian(data_prediction: bool):
    """The exact prediction of x_0, or of the noise, from x at a point."""

    def predict(x: torch.Tensor, point: Point) -> torch.Tensor:
        part = point.alpha * SPREAD**2 if data_prediction else point.sigma
        return x * (part / std(point) ** 2)

    return predict


def one_step(solver: Solver, order: int, method: str, h: float, predict) -> float:
    """The error of one update of h in lam from exact values."""
    start, end = TIME.at_lam(-0.3), TIME.at_lam(-0.3 + h)
    x = torch.ones(1, dtype=torch.float64)
    if method == "singlestep":
        made = solver.singlestep(x, start, end, order, predict(x, start), predict)
    else:
        before = [start, TIME.at_lam(-0.3 - 0.8 * h), TIME.at_lam(-0.3 - 2.0 * h)]
        made = solver.multistep(x, end, [(p, predict(exact(x, start, p), p)) for p in before[:order]])
    return float((made - exact(x, start, end)).abs())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("data_prediction", [True, False])
def test_the_error_of_a_step_falls_as_its_order_says(data_prediction: bool, order: int, method: str) -> None:
    solver, predict = Solver(data_prediction, TIME), gaussian(data_prediction)
    errors = [one_step(solver, order, method, h, predict) for h in (0.2, 0.1, 0.05, 0.025)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert rates[-1] > order + 0.7, (errors, rates)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_error_of_a_run_falls_as_the_order_says(algorithm: str, order: int) -> None:
    """Single steps; multistep runs begin with lower orders, so the next test compares them with one another."""
    errors = [run_error(algorithm, order, "singlestep", order * steps) for steps in (8, 16, 32)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert rates[-1] > order - 0.4, (errors, rates)


def run_error(algorithm: str, order: int, method: str, S: int) -> float:
    """Largest error of a whole run in float64; the last steps' lower orders are left out."""
    sampler = DPMSolverSampler(Model(toy), algorithm=algorithm, order=order, method=method, spacing="logSNR")
    sampler.time = TIME
    sampler.solver = solver = Solver(sampler.solver.data, TIME)
    sampler.make_schedule(S)
    predict, x = gaussian(solver.data), torch.ones(1, dtype=torch.float64)
    points, known = sampler.points, []
    if method == "singlestep":
        points = TIME.even_in_lam(points[0], TIME.at_lam(2.0), S // order)
    start = points[0]
    for here, end in zip(points, points[1:], strict=False):
        if method == "singlestep":
            x = solver.singlestep(x, here, end, order, predict(x, here), predict)
        else:
            known = [(here, predict(x, here)), *known][:order]
            x = solver.multistep(x, end, known)
    return float((x - exact(torch.ones(1, dtype=torch.float64), start, points[-1])).abs())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_higher_orders_are_better_at_the_same_cost(algorithm: str) -> None:
    errors = [run_error(algorithm, order, "multistep", 40) for order in (1, 2, 3)]
    assert errors[0] > 5 * errors[1] > 10 * errors[2], errors


@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_multistep_updates_agree_with_diffusers(algorithm: str, order: int) -> None:
    peer = DPMSolverMultistepScheduler(
        1000, 0.00085, 0.012, "scaled_linear", solver_order=order, algorithm_type=algorithm, solver_type="midpoint",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    sampler = DPMSolverSampler(Model(toy), algorithm=algorithm, order=order)
    sampler.make_schedule(10)
    peer.set_timesteps(10)
    peer.sigmas = torch.tensor([p.sigma / p.alpha for p in sampler.points])
    peer._step_index = 4
    values = [data(f"prediction {n}", X_T.shape) for n in (4, 3)]
    known = list(zip([sampler.points[4], sampler.points[3]], values, strict=True))[:order]
    update = {1: lambda: peer.dpm_solver_first_order_update(values[0], sample=X_T),
              2: lambda: peer.multistep_dpm_solver_second_order_update(values[::-1], sample=X_T)}  # fmt: skip
    torch.testing.assert_close(
        sampler.solver.multistep(X_T, sampler.points[5], known), update[order](), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("order", (2, 3))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_single_steps_agree_with_diffusers(algorithm: str, order: int) -> None:
    """diffusers takes the points inside a step from the schedule, so it is given ours."""
    peer = DPMSolverSinglestepScheduler(
        1000, 0.00085, 0.012, "scaled_linear", solver_order=order, algorithm_type=algorithm, solver_type="midpoint",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    solver = Solver(algorithm == "dpmsolver++", TIME)
    points = TIME.even_in_lam(TIME.at_lam(-1.0), TIME.at_lam(0.2), order)
    predict = gaussian(solver.data)
    peer.set_timesteps(order)
    peer.sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    values = []

    def recorded(x: torch.Tensor, point: Point) -> torch.Tensor:
        values.append(predict(x, point))
        return values[-1]

    x = X_T.double()
    made = solver.singlestep(x, points[0], points[-1], order, recorded(x, points[0]), recorded)
    peer._step_index = order - 1
    update = peer.singlestep_dpm_solver_second_order_update if order == 2 else None
    if order == 3:
        update = peer.singlestep_dpm_solver_third_order_update
    torch.testing.assert_close(made, update(values, sample=x), atol=1e-5, rtol=1e-5)


def test_the_originals_picture_and_ddim_as_order_one() -> None:
    assert_golden(run(DPMSolverSampler, Model(toy), 20, 7.5), "dpm_S20_s7.5")
    assert "dpm_S20_s7.5" in GOLDENS
    for algorithm in ("dpmsolver++", "dpmsolver"):  # of order one both are DDIM
        sampler = DPMSolverSampler(Model(toy), algorithm=algorithm, order=1)
        made = sampler.sample(10, 2, (4, 8, 8), C, x_T=X_T, **QUIET)[0]
        other = DPMSolverSampler(Model(toy), algorithm="dpmsolver++", order=1, method="singlestep")
        torch.testing.assert_close(made, other.sample(10, 2, (4, 8, 8), C, x_T=X_T, **QUIET)[0], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """What enough steps of DDIM come to."""
    return run(DDIMSampler, Model(toy), 1000)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_variant_comes_to_the_same_picture(
    algorithm: str, method: str, order: int, spacing: str, reference: torch.Tensor
) -> None:
    """The network is asked S times, and with enough steps all solve the same equation."""
    model, calls = Model(toy), []
    model.apply_model = lambda x, t, c: (calls.append(float(t[0])), toy(x, t, c))[1]
    sampler = DPMSolverSampler(model, algorithm=algorithm, method=method, order=order, spacing=spacing)
    made = sampler.sample(60, 2, (4, 8, 8), C, x_T=X_T, **QUIET)[0]
    assert len(calls) == 60
    assert 0 <= min(calls) and max(calls) == pytest.approx(999, abs=1e-2) and calls == sorted(calls, reverse=True)
    assert (made - reference).abs().mean() < 0.05 * reference.abs().mean()


def test_spacings_of_the_original() -> None:
    for name, even in (("time_uniform", lambda p: p.time), ("time_quadratic", lambda p: p.time**0.5),
                       ("logSNR", lambda p: p.lam)):  # fmt: skip
        points = TIME.spaced(name, 20)
        gaps = np.diff([even(p) for p in points])
        assert np.allclose(gaps, gaps[0])
        assert (points[0].time, points[-1].time) == pytest.approx((1.0, 0.001))
    assert [TIME.timestep(p) for p in TIME.spaced("time_uniform", 999)] == pytest.approx(list(range(999, -1, -1)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_single_steps_use_every_evaluation(order: int) -> None:
    for evaluations in range(1, 30):
        orders = singlestep_orders(order, evaluations)
        assert sum(orders) == evaluations and max(orders) <= order
        assert orders == sorted(orders, reverse=True)


def test_time_and_log_snr_are_inverse() -> None:
    for time in (0.001, 0.0123, 0.5, 0.98765, 1.0):
        point = TIME.at_time(time)
        assert point.alpha**2 + point.sigma**2 == pytest.approx(1.0)
        assert TIME.at_lam(point.lam).time == pytest.approx(time)


def test_thresholding_clips_each_sample_by_its_own_quantile() -> None:
    x0 = torch.stack([data("small", (4, 32, 32)).clamp(-0.9, 0.9), 5 * data("large", (4, 32, 32))])
    made = clipped(x0)
    torch.testing.assert_close(made[0], x0[0])
    s = torch.quantile(x0[1].abs().flatten(), 0.995)
    torch.testing.assert_close(made[1], x0[1].clamp(-s, s) / s)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_thresholding_bounds_the_picture(algorithm: str) -> None:
    def largest(**settings: object) -> float:
        sampler = DPMSolverSampler(Model(lambda x, t, c: 0.5 * x), algorithm=algorithm, **settings)
        _, seen = sampler.sample(20, 2, (4, 8, 8), C, x_T=4 * X_T, log_every_t=1, **QUIET)
        return max(float(x0.abs().max()) for x0 in seen["pred_x0"][1:])

    assert largest() > 10
    assert largest(thresholding=True) == pytest.approx(1.0, abs=1e-3)
    assert largest(thresholding=True, thresholding_max_val=2.0) == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    "settings", [{"order": 4}, {"algorithm": "sde"}, {"method": "adaptive"}, {"spacing": "karras"}]
)
def test_unknown_settings_are_named(settings: dict) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(UserError, match=f"{name} '{value}' is none of"):
        DPMSolverSampler(Model(toy), **settings)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_noised_image_is_denoised_by_what_is_left(method: str, order: int) -> None:
    """Zero data: from any place of the schedule the exact noise prediction leads back to it."""
    sampler = DPMSolverSampler(Model(lambda x, t, c: x), method=method, order=order)
    sampler.model.apply_model = lambda x, t, c: x / torch.tensor(TIME.at_time(float(t[0] + 1) / 1000).sigma).float()
    sampler.make_schedule(20)
    for left in (1, 7, 20):
        x = sampler.stochastic_encode(torch.zeros(2, 4, 8, 8), left, noise=X_T)
        made = sampler.decode(x, C, left, show_progress=False)
        torch.testing.assert_close(made, sampler.points[-1].sigma * X_T, atol=1e-3, rtol=1e-2)
