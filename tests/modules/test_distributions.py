"""The posterior against torch's own normal distribution."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from tests.goldens.fill import data


def test_agrees_with_torch() -> None:
    ours = DiagonalGaussianDistribution(data("p", (2, 8, 3, 5)))
    other = DiagonalGaussianDistribution(data("q", (2, 8, 3, 5)))
    peer, other_peer = (Normal(d.mean, d.std) for d in (ours, other))
    standard = Normal(torch.zeros(()), torch.ones(()))
    sample = data("sample", (2, 4, 3, 5))
    torch.testing.assert_close(ours.kl(), kl_divergence(peer, standard).sum((1, 2, 3)))
    torch.testing.assert_close(ours.kl(other), kl_divergence(peer, other_peer).sum((1, 2, 3)))
    torch.testing.assert_close(ours.nll(sample), -peer.log_prob(sample).sum((1, 2, 3)))
    torch.testing.assert_close(ours.var, peer.variance)


def test_samples_scatter_around_the_mode_as_std_says() -> None:
    ours = DiagonalGaussianDistribution(data("p", (1, 2, 2, 2)).expand(20_000, -1, -1, -1))
    draws = ours.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), ours.mode()[0], atol=0.05, rtol=0.0)
    torch.testing.assert_close(draws.std(0), ours.std[0], atol=0.0, rtol=0.03)
    assert torch.equal(draws, ours.sample(torch.Generator().manual_seed(0)))


def test_extreme_log_variances_stay_finite_and_a_deterministic_posterior_has_none() -> None:
    extreme = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, 1e4, -1e4]).reshape(1, 4, 1, 1))
    assert torch.isfinite(extreme.kl()).all() and extreme.logvar.flatten().tolist() == [20.0, -30.0]
    certain = DiagonalGaussianDistribution(data("p", (1, 8, 2, 2)), deterministic=True)
    assert torch.equal(certain.sample(), certain.mode()) and certain.kl() == 0 and certain.nll(certain.mean) == 0
