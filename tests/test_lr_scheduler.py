import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import UserError
from ldm.lr_scheduler import (
    LambdaExponentialScheduler,
    LambdaInverseScheduler,
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)


def test_cosine_passes_through_its_corners():
    f = LambdaWarmUpCosineScheduler(10, lr_min=0.1, lr_max=1.0, lr_start=0.0, max_decay_steps=110).schedule
    assert f(0) == 0.0
    assert f(5) == pytest.approx(0.5)
    assert f(10) == pytest.approx(1.0)
    assert f(60) == pytest.approx(0.55)
    assert f(110) == f(10_000) == pytest.approx(0.1)


def test_stable_diffusions_schedule_warms_up_and_stays():
    f = LambdaLinearScheduler([10000], f_min=[1.0], f_max=[1.0], f_start=[1e-6], cycle_lengths=[10**13]).schedule
    assert f(0) == pytest.approx(1e-6)
    assert f(5000) == pytest.approx(0.5, rel=1e-4)
    assert f(10000) == f(10**6) == 1.0


def test_cycles_restart():
    f = LambdaLinearScheduler([2, 2], [0.0, 0.0], [1.0, 0.5], [0.0, 0.0], [10, 10]).schedule
    assert f(2) == pytest.approx(0.8) and f(10) == 0.0
    assert f(12) == pytest.approx(0.4) and f(20) == 0.0 == f(1000)


@given(st.integers(0, 10**6))
def test_multipliers_stay_within_their_bounds(n):
    f = LambdaWarmUpCosineScheduler2([5, 7], [0.1, 0.05], [1.0, 0.7], [0.01, 0.1], [100, 200]).schedule
    assert 0.01 <= f(n) <= 1.0 and math.isfinite(f(n))


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="f_min has 2"):
        LambdaLinearScheduler([1], [0.0, 0.0], [1.0], [0.0], [10])


def test_the_inverse_schedule_falls_as_said_after_its_warm_up():
    f = LambdaInverseScheduler(inv_gamma=20_000, power=2.0, warmup=0.99).schedule
    assert f(0) == pytest.approx(0.01) and f(99) == pytest.approx((1 - 0.99**100) * (1 + 99 / 20_000) ** -2)
    assert f(20_000) == pytest.approx(1 / 4) and f(60_000) == pytest.approx(1 / 16)
    assert LambdaInverseScheduler(20_000, min_value=0.3).schedule(10**7) == pytest.approx(0.3)
    assert LambdaInverseScheduler(power=0.0).schedule(10**7) == 1.0


def test_the_exponential_schedule_falls_as_said_after_its_warm_up():
    f = LambdaExponentialScheduler(num_steps=100, decay=0.5, warmup=0.9)
    assert f(0) == pytest.approx(0.1) and f(200) == pytest.approx(0.25) == f.schedule(200)


@pytest.mark.parametrize("make", [
    lambda: LambdaInverseScheduler(warmup=1.0), lambda: LambdaInverseScheduler(inv_gamma=0),
    lambda: LambdaExponentialScheduler(10, decay=0),
])  # fmt: skip
def test_schedules_out_of_their_range_are_refused(make):
    with pytest.raises(UserError):
        make()
