"""How far two sets of pictures are apart, from the features of each: FID and KID."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.errors import UserError

SUBSETS, SUBSET_SIZE = 100, 1000  # KID's, as published scores have them


@dataclass(frozen=True)
class Statistics:
    """What FID knows of a set of pictures: `mean` [D] and `covariance` [D, D] of their features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """From features [N, D] of at least two pictures."""
        features = features.astype(np.float64)
        return cls(features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """From a .npz with `mu` and `sigma`, the form in which FID statistics are published.

        Raises:
            UserError: the file is no such thing.
        """
        try:
            with np.load(path) as file:
                mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"statistics: '{path}' is no .npz file with mu and sigma: {error}") from error
        size = mean.size
        if mean.shape != (size,) or covariance.shape != (size, size) or not np.isfinite(covariance).all():
            raise UserError(f"statistics: '{path}': mu must be [D] and sigma [D, D], and all of it numbers")
        return cls(mean, covariance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz with `mu` and `sigma`."""
        from ldm.util import atomic_path

        with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Frechet distance between two Gaussians, FID (Heusel et al., 2017, equation 6).

    The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: its eigenvalues are real, and no
    root of an ill-conditioned product is taken.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = np.sqrt(shared.clip(min=0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return float(max(distance, 0.0))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of features x [N, D] and y [N', D].

    The kernel is (x.y / D + 1)^3 (Binkowski et al., 2018, equation 4 and section 4).
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        values = a @ b.T
        values /= a.shape[1]
        values += 1
        cubes = values * values  # in place, for the arrays are large, and a power would be slow
        cubes *= values
        return cubes

    def within(a: np.ndarray) -> float:
        values = kernel(a, a)
        return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def kernel_distance(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """KID: mean and standard deviation of `squared_mmd` over random subsets of features x [N, D] and y [N', D].

    Subsets have `SUBSET_SIZE` pictures of each; of fewer, all are taken, once, and the deviation is 0.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    size = min(SUBSET_SIZE, len(x), len(y))
    rng = np.random.default_rng(seed)
    repeats = 1 if size == len(x) == len(y) else SUBSETS
    values = [squared_mmd(*(z[rng.choice(len(z), size, replace=False)] for z in (x, y))) for _ in range(repeats)]
    return float(np.mean(values)), float(np.std(values))
