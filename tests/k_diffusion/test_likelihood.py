"""Log-likelihoods against the known ones of Gaussian data: estimates, their errors, wrapped models."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from ldm.k_diffusion.external import DiscreteEpsDDPMDenoiser, DiscreteVDDPMDenoiser, VDenoiser
from ldm.k_diffusion.likelihood import bits_per_dim, estimate, log_likelihood, rademacher

SIGMAS = 0.05, 5000.0  # so high that the data's own mean and spread are lost in the noise
D = 5


class Gaussian:
    """Data N(mean, covariance) and its exact denoiser."""

    def __init__(self, diagonal: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.mean = torch.randn(D, generator=generator, dtype=torch.float64)
        root = torch.randn(D, D, generator=generator, dtype=torch.float64) / 2
        self.covariance = torch.diag(root.diag() ** 2 + 0.1) if diagonal else root @ root.T + 0.1 * torch.eye(D)
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def __call__(self, x, sigma):
        """The mean of the data given what is seen of it."""
        shrunk = self.values / (self.values + sigma[:, None] ** 2)
        return self.mean + ((x - self.mean) @ self.vectors * shrunk) @ self.vectors.T

    def seen(self, sigma):
        """The distribution of the data with noise."""
        return MultivariateNormal(self.mean, self.covariance + sigma**2 * torch.eye(D))

    def sample(self, count):
        torch.manual_seed(1)
        return self.seen(SIGMAS[0]).sample((count,))


def test_the_likelihood_is_the_gaussians_within_its_error():
    data = Gaussian()
    x = data.sample(200)
    torch.manual_seed(2)
    found = estimate(data, x, *SIGMAS, rademacher(x, 8), atol=1e-5, rtol=1e-5)
    exact = data.seen(SIGMAS[0]).log_prob(x)
    z = (found.nats - exact) / found.error
    assert (found.error > 0.01).all() and found.error.mean() < 1.5
    assert abs(z.mean()) < 0.25 and (z.abs() < 2.36).double().mean() > 0.9  # Student's t with 7 degrees: 0.95
    assert z.square().mean() == pytest.approx(7 / 5, abs=0.5)  # its variance


def test_where_the_trace_needs_no_estimate_the_likelihood_is_exact():
    data = Gaussian(diagonal=True)
    x = data.sample(50)
    exact = data.seen(SIGMAS[0]).log_prob(x)
    found = estimate(data, x, *SIGMAS, rademacher(x, 2), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found.nats, exact, rtol=0, atol=2e-3)
    assert (found.error < 1e-6).all()
    coarse, info = log_likelihood(data, x.float(), *SIGMAS)
    torch.testing.assert_close(coarse.double(), exact, rtol=0, atol=2e-2)
    assert 20 < info["fevals"] < found.evaluations


def alphas_cumprod():
    return torch.linspace(0.001**0.5, 0.1**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)


class Epsilon(torch.nn.Module):
    """The noise, v or v at v-diffusion's times of the Gaussian's exact denoiser, as networks are asked for it."""

    def __init__(self, data, kind):
        super().__init__()
        self.data, self.kind, self.levels = data, kind, None

    def forward(self, x, t):
        sigma = self.levels.t_to_sigma(t)
        alpha = (1 + sigma**2).rsqrt()[:, None]
        clean = self.data(x / alpha, sigma)
        eps = (x - alpha * clean) / (alpha * sigma[:, None])
        return eps if self.kind == "eps" else alpha * eps - alpha * sigma[:, None] * clean


@pytest.mark.parametrize("kind", ["eps", "v", "v-diffusion"])
def test_wrapped_models_have_the_likelihood_of_native_ones(kind):
    data = Gaussian()
    network = Epsilon(data, kind)
    if kind == "v-diffusion":
        wrapped = VDenoiser(network)
    else:
        wrapper = DiscreteEpsDDPMDenoiser if kind == "eps" else DiscreteVDDPMDenoiser
        wrapped = wrapper(network, alphas_cumprod(), quantize=False)
    network.__dict__["levels"] = wrapped
    low, high = (0.04, 100.0) if kind == "v-diffusion" else (float(wrapped.sigma_min), float(wrapped.sigma_max))
    x = data.sample(8)
    probes = rademacher(x, 1, [torch.Generator().manual_seed(i) for i in range(8)])
    native, found = (estimate(model, x, low, high, probes, atol=1e-5, rtol=1e-5) for model in (data, wrapped))
    torch.testing.assert_close(found.each, native.each, rtol=0, atol=1e-2)


def test_a_samples_probes_do_not_depend_on_its_batch():
    x = torch.zeros(3, 2, 4, 4)
    probes = rademacher(x, 5, [torch.Generator().manual_seed(i) for i in range(3)])
    alone = rademacher(x[1:2], 5, [torch.Generator().manual_seed(1)])
    assert torch.equal(probes[:, 1], alone[:, 0]) and probes.shape == (5, *x.shape)
    assert set(probes.unique().tolist()) == {-1.0, 1.0} and abs(probes.mean()) < 0.2


def test_uniform_bytes_take_eight_bits():
    width, dimensions = 2 / 255, 12
    density = dimensions * math.log(1 / (256 * width))  # of 256 cells, equally likely
    assert bits_per_dim(torch.tensor([density]), dimensions, width).item() == pytest.approx(8)
    assert bits_per_dim(torch.tensor([0.0]), dimensions).item() == 0
