import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.modules.diffusionmodules.util import (
    GroupNorm32,
    checkpoint,
    extract_into_tensor,
    make_beta_schedule,
    normalization,
    timestep_embedding,
)
from tests.networks import GOLDENS

GOLDEN = np.load(GOLDENS / "modules.npz")


def test_stable_diffusions_betas():
    betas = make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
    np.testing.assert_allclose(betas, GOLDEN["beta_linear"], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "sqrt_linear", "sqrt", "cosine"])
def test_betas_are_variances_that_end_in_noise(schedule):
    betas = make_beta_schedule(schedule, 1000)
    assert betas.shape == (1000,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas < 1).all()
    assert np.prod(1 - betas) < 0.05


def test_cosine_betas_against_diffusers():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2").betas.numpy()
    np.testing.assert_allclose(make_beta_schedule("cosine", 200), theirs, rtol=1e-4)


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="beta_schedule: 'square'.*cosine"):
        make_beta_schedule("square", 10)


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([0, 1, 500, 999]), 33)
    np.testing.assert_allclose(embedding.numpy(), GOLDEN["temb"], atol=1e-6)


def test_timestep_embedding_takes_fractions():
    cosine = timestep_embedding(torch.tensor([10.5]), 8)[0, 0]
    assert cosine == pytest.approx(np.cos(10.5), abs=1e-6)


def test_extract_broadcasts_over_a_batch():
    values = extract_into_tensor(torch.arange(5.0), torch.tensor([3, 1]), torch.Size([2, 4, 8, 8]))
    assert values.shape == (2, 1, 1, 1) and values.flatten().tolist() == [3.0, 1.0]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_group_norm_keeps_half_precision(weights):
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    norm = GroupNorm32(32, 64)
    expected = norm(x)
    got = norm.to(weights)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.05


def test_widths_that_32_does_not_divide_are_refused():
    with pytest.raises(UserError, match="48 channels.*multiple of 32"):
        normalization(48)


def test_checkpoint_gives_gradients_when_no_input_needs_one():
    layer = torch.nn.Linear(3, 3)
    checkpoint(layer, torch.ones(2, 3), enabled=True).sum().backward()
    assert layer.weight.grad is not None
