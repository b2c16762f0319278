from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ldm.evaluation.distances import Statistics, frechet_distance, kernel_distance, squared_mmd
from ldm.util import UserError


def features(count: int, dimensions: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated, and not of mean zero, as features are."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + rng.normal() + shift


@pytest.mark.parametrize("dimensions, count", [(1, 30), (5, 40), (60, 500), (60, 20)])
def test_frechet_distance_is_scipys(dimensions: int, count: int) -> None:
    a, b = (Statistics.of(features(count, dimensions, seed)) for seed in (0, 1))
    root = sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(a.covariance))


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    a = Statistics(np.zeros(3), np.diag([1.0, 4.0, 0.0]))
    b = Statistics(np.array([1.0, 2.0, 0.0]), np.diag([9.0, 4.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (3 - 1) ** 2 + 25)


def test_squared_mmd_is_the_unbiased_estimate() -> None:
    x, y = features(7, 4, 0), features(9, 4, 1)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within = [np.mean([kernel(z[i], z[j]) for i, j in product(range(len(z)), repeat=2) if i != j]) for z in (x, y)]
    between = np.mean([kernel(a, b) for a, b in product(x, y)])
    assert squared_mmd(x, y) == pytest.approx(sum(within) - 2 * between)


def test_kernel_distance_of_one_distribution_has_mean_zero() -> None:
    values = [squared_mmd(*np.random.default_rng(seed).normal(size=(2, 50, 6))) for seed in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5 and min(values) < 0


def test_kernel_distance_is_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).float() / 255

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8, generator=generator)
    fake = (real.flip(0) * 0.5 + 30).to(torch.uint8)
    kid = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40, normalize=False)
    fid = FrechetInceptionDistance(feature=Pixels(), normalize=False)
    for metric in (kid, fid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    x, y = (Pixels()(images).numpy() for images in (real, fake))
    assert kernel_distance(x, y) == (pytest.approx(float(kid.compute()[0]), rel=1e-3), 0.0)
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(float(fid.compute()), rel=1e-3)


def test_kernel_distance_over_subsets_is_near_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.evaluation.distances.SUBSET_SIZE", 150)
    x, y = features(220, 3, 0) / 5, features(250, 3, 0, shift=0.5) / 5
    mean, deviation = kernel_distance(x, y)
    assert mean == pytest.approx(squared_mmd(x, y), abs=deviation) and 0 < deviation < mean
    assert kernel_distance(x, y) == (mean, deviation)


def test_statistics_come_back_from_a_file(tmp_path: Path) -> None:
    statistics = Statistics.of(features(30, 4, 0))
    statistics.save(tmp_path / "statistics.npz")
    back = Statistics.load(tmp_path / "statistics.npz")
    assert np.array_equal(back.mean, statistics.mean) and np.array_equal(back.covariance, statistics.covariance)
    assert np.load(tmp_path / "statistics.npz").files == ["mu", "sigma"]


@pytest.mark.parametrize("content", [b"words", {"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}])
def test_other_files_are_no_statistics(content, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match="statistics.npz") as error:
        Statistics.load(path)
    assert "\n" not in str(error.value)
