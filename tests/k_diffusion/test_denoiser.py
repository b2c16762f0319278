"""The preconditioned denoiser against the formulas of Karras et al. (2022), table 1."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.k_diffusion.denoiser import Denoiser, DenoiserWithVariance

SIGMA = torch.tensor([0.02, 0.5, 3.0, 80.0])


class Network(torch.nn.Module):
    """Remembers what it is called with, and answers with a multiple of it."""

    def forward(self, x, sigma, return_variance=False):
        self.seen = x, sigma
        return (0.3 * x, torch.tensor([0.1, -0.2, 0.5, 0.0])) if return_variance else 0.3 * x


def test_the_denoised_image_is_skip_and_output_mixed():
    network, x = Network(), torch.randn(4, 3, 8, 8)
    denoised = Denoiser(network, sigma_data=0.5)(x, SIGMA)
    for i, s in enumerate(SIGMA.tolist()):
        total = s**2 + 0.25
        seen = x[i] / math.sqrt(total)
        torch.testing.assert_close(network.seen[0][i], seen)
        expected = 0.25 / total * x[i] + s * 0.5 / math.sqrt(total) * 0.3 * seen
        torch.testing.assert_close(denoised[i], expected)
    assert network.seen[1] is SIGMA


def test_the_loss_is_the_papers_whose_weight_is_lambda():
    """Equation 2 with lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    denoiser, x, noise = Denoiser(Network(), sigma_data=0.5), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    s = SIGMA.view(-1, 1, 1, 1)
    weight = (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2
    expected = weight * ((denoiser(x + s * noise, SIGMA) - x) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(denoiser.loss(x, noise, SIGMA), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["snr", "sqrt-snr", "soft-min-snr"])
def test_other_weightings(weighting):
    """snr is the plain loss of predicted noise; soft-min-snr is 1 / (1 + snr) of that, and sqrt-snr between."""
    x, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    denoiser = Denoiser(Network(), 0.5, weighting)
    s, snr = SIGMA.view(-1, 1, 1, 1), (0.5 / SIGMA) ** 2
    noisy = x + s * noise
    predicted = (noisy - denoiser(noisy, SIGMA)) / s
    plain = ((predicted - noise) ** 2).flatten(1).mean(1)
    factor = {"snr": 1.0, "sqrt-snr": snr.rsqrt(), "soft-min-snr": 1 / (1 + snr)}[weighting]
    torch.testing.assert_close(denoiser.loss(x, noise, SIGMA), plain * factor, rtol=1e-3, atol=1e-5)


def test_the_variance_output_is_scored_as_a_gaussian():
    x, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    denoiser = DenoiserWithVariance(Network(), 0.5)
    s = SIGMA.view(-1, 1, 1, 1)
    c_skip, c_out, _ = denoiser.get_scalings(s)
    target = (x - c_skip * (x + s * noise)) / c_out
    loss = denoiser.loss(x, noise, SIGMA)
    output = 0.3 * denoiser.inner_model.seen[0]
    scale = torch.tensor([0.1, -0.2, 0.5, 0.0]).view(-1, 1, 1, 1).mul(0.5).exp()
    density = torch.distributions.Normal(output, scale).log_prob(target).flatten(1).mean(1)
    torch.testing.assert_close(loss, -density - math.log(2 * math.pi) / 2)


def test_a_perturbed_input_keeps_its_target():
    x, noise, other = (torch.randn(4, 1, 8, 8) for _ in range(3))
    denoiser = Denoiser(Network(), 0.5)
    denoiser.loss(x, noise, SIGMA, other)
    s = SIGMA.view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser.inner_model.seen[0], (x + s * other) * denoiser.get_scalings(s)[2])


@pytest.mark.parametrize("settings, said", [
    (dict(weighting="min-snr"), "weighting is 'min-snr'; it must be one of karras, snr, sqrt-snr, soft-min-snr"),
    (dict(sigma_data=0), "sigma_data is 0"),
])  # fmt: skip
def test_wrong_settings_are_said(settings, said):
    with pytest.raises(UserError, match=said):
        Denoiser(Network(), **settings)
