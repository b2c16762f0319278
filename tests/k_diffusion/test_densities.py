"""Noise levels' densities against SciPy's distributions, and against the papers' schedules."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ldm.errors import UserError
from ldm.k_diffusion import densities
from ldm.modules.randomness import SampleRandom

U = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cut(distribution, low, high):
    """The distribution function of what of a distribution lies between two numbers."""
    ends = distribution.cdf([low, high])
    return lambda x: np.clip((distribution.cdf(x) - ends[0]) / (ends[1] - ends[0]), 0, 1)


def two_halves(loc, left, right):
    """The distribution function of a split normal distribution, written down from its two halves."""
    share = left / (left + right)
    below, above = stats.norm(loc, left).cdf, stats.norm(loc, right).cdf
    return lambda x: np.where(x < loc, 2 * share * below(x), share + (1 - share) * (2 * above(x) - 1))


@pytest.mark.parametrize("density, cdf", [
    (densities.LogNormal(-1.2, 1.2), stats.lognorm(1.2, scale=math.exp(-1.2)).cdf),
    (densities.LogLogistic(-0.5, 0.4), stats.fisk(1 / 0.4, scale=math.exp(-0.5)).cdf),
    (densities.LogLogistic(-0.5, 0.4, 0.3, 5.0), cut(stats.fisk(1 / 0.4, scale=math.exp(-0.5)), 0.3, 5.0)),
    (densities.LogUniform(0.01, 80.0), stats.loguniform(0.01, 80.0).cdf),
    (densities.VDiffusion(0.5, 0.0, math.inf), stats.halfcauchy(scale=0.5).cdf),
    (densities.VDiffusion(0.5, 0.02, 50.0), cut(stats.halfcauchy(scale=0.5), 0.02, 50.0)),
    (densities.SplitLogNormal(-1.0, 0.7, 1.6), lambda x: two_halves(-1.0, 0.7, 1.6)(np.log(x))),
], ids=lambda value: getattr(type(value), "__name__", ""))  # fmt: skip
def test_noise_levels_are_distributed_as_said(density, cdf):
    sigma = density(U)
    assert sigma.dtype == torch.float32 and bool((sigma > 0).all())
    assert stats.kstest(sigma.double().numpy(), cdf).pvalue > 0.01
    wrong = stats.kstest(1.1 * sigma.double().numpy(), cdf)
    assert wrong.pvalue < 1e-3  # the test can fail


def test_the_interpolated_cosine_is_simple_diffusions():
    """logsnr(t) as in Hoogeboom et al. (2023), by its definition in t, the noisier the later."""
    t = np.linspace(0, 1, 101)

    def shifted(noise_d, low, high):
        shift = 2 * math.log(noise_d / 256)
        first, last = (math.atan(math.exp(-0.5 * (end - shift))) for end in (high, low))
        return -2 * np.log(np.tan(first + t * (last - first))) + shift

    low, high = (-2 * math.log(value / 0.5) for value in (1e3, 1e-3))
    logsnr = t * shifted(32, low, high) + (1 - t) * shifted(256, low, high)
    density = densities.CosineInterpolated(image_d=256, noise_d_high=256, noise_d_low=32, sigma_data=0.5)
    sigma = density.quantile(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(sigma, 0.5 * np.exp(-logsnr / 2), rtol=1e-9)
    assert (np.diff(sigma) > 0).all()


@pytest.mark.parametrize("density", [
    densities.LogNormal(), densities.LogLogistic(), densities.VDiffusion(1.0, 0.0, math.inf),
    densities.SplitLogNormal(0.0, 1.0, 2.0),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_the_ends_are_finite(density):
    sigma = density(torch.tensor([0.0, 1 - 2**-24, 1.0]))
    assert bool(sigma.isfinite().all()) and bool((sigma > 0).all())


def test_strata_fill_every_part_once_over_all_processes():
    numbers = [SampleRandom(5, 0, rank, 100, "cpu", 2).rand().double() for rank in range(2)]
    both = torch.cat([densities.strata(u, rank, 2) for rank, u in enumerate(numbers)])
    assert sorted((both * 200).long().tolist()) == list(range(200))
    assert abs(float(both.mean()) - 0.5) < 1 / 400 < abs(float(torch.cat(numbers).mean()) - 0.5)


@pytest.mark.parametrize("make, said", [
    (lambda: densities.LogNormal(scale=0), "scale is 0; it must be above 0"),
    (lambda: densities.LogNormal(loc="a"), "loc is 'a'; it must be a number"),
    (lambda: densities.LogUniform(2.0, 1.0), "from min_value 2.0 to max_value 1.0 there is nothing"),
    (lambda: densities.LogUniform(0.0, 1.0), "LogUniform needs min_value above 0"),
])  # fmt: skip
def test_wrong_numbers_are_said(make, said):
    with pytest.raises(UserError, match=said):
        make()
