"""Wrappers of other kinds of models against their own formulas, and against the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.k_diffusion import sampling
from ldm.k_diffusion.external import (
    CompVisDenoiser,
    CompVisVDenoiser,
    DiscreteEpsDDPMDenoiser,
    DiscreteSchedule,
    DiscreteVDDPMDenoiser,
    OpenAIDenoiser,
    VDenoiser,
    sigmas_of,
)
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.karras import KarrasSampler
from tests.goldens.fill import data
from tests.models.toys import BETAS, X_T, C, Model, run, toy

ABAR = torch.cumprod(1 - BETAS, 0).float()
SCHEDULE = DiscreteSchedule(sigmas_of(ABAR), quantize=False)


class Known(nn.Module):
    """A network that sees what was mixed: it answers with the noise or v of known x_0 and noise at timestep t."""

    def __init__(self, kind: str, x_start: torch.Tensor, noise: torch.Tensor, alpha: Callable) -> None:
        super().__init__()
        self.kind, self.x_start, self.noise, self.alpha = kind, x_start, noise, alpha

    def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        alpha = self.alpha(t).view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        torch.testing.assert_close(x, alpha * self.x_start + sigma * self.noise, atol=1e-5, rtol=1e-4)
        return self.noise if self.kind == "eps" else alpha * self.noise - sigma * self.x_start


X_START, NOISE = data("start", (3, 2, 4, 4)), data("noise", (3, 2, 4, 4))
T = torch.tensor([3, 400, 990])


def trained_alpha(t: torch.Tensor) -> torch.Tensor:
    return ABAR[t.round().long()].sqrt()


def apply_model(network: Known) -> Any:
    return SimpleNamespace(alphas_cumprod=ABAR, apply_model=lambda x, t, cond: network(x, t))


def openai(network: Known, learned: bool) -> OpenAIDenoiser:
    """The noise, with a variance behind it when that is learned."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(x, t), torch.full_like(x, 9.0)], dim=1) if learned else network(x, t)

    return OpenAIDenoiser(model, SimpleNamespace(alphas_cumprod=ABAR.double().numpy()), has_learned_sigmas=learned)


def v_diffusion_alpha(t: torch.Tensor) -> torch.Tensor:
    return (t * torch.pi / 2).cos()


DISCRETE = {
    "CompVis eps": lambda: CompVisDenoiser(apply_model(Known("eps", X_START, NOISE, trained_alpha))),
    "CompVis v": lambda: CompVisVDenoiser(apply_model(Known("v", X_START, NOISE, trained_alpha)), quantize=True),
    "eps": lambda: DiscreteEpsDDPMDenoiser(Known("eps", X_START, NOISE, trained_alpha), ABAR, quantize=True),
    "v": lambda: DiscreteVDDPMDenoiser(Known("v", X_START, NOISE, trained_alpha), ABAR, quantize=False),
    "OpenAI": lambda: openai(Known("eps", X_START, NOISE, trained_alpha), learned=True),
    "OpenAI, fixed variance": lambda: openai(Known("eps", X_START, NOISE, trained_alpha), learned=False),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_a_perfect_network_is_a_perfect_denoiser(name: str) -> None:
    denoiser = DISCRETE[name]()
    sigma = sigmas_of(ABAR)[T]
    extra = {"cond": C} if name.startswith("CompVis") else {}
    noised = X_START + NOISE * sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(noised, sigma, **extra), X_START, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(denoiser.loss(X_START, NOISE, sigma, **extra), torch.zeros(3), atol=1e-6, rtol=0)


def test_v_diffusion() -> None:
    denoiser = VDenoiser(Known("v", X_START, NOISE, v_diffusion_alpha))
    t = torch.tensor([0.1, 0.5, 0.9])
    sigma = denoiser.t_to_sigma(t)
    alpha = v_diffusion_alpha(t)
    torch.testing.assert_close(sigma, (1 - alpha**2).sqrt() / alpha)
    torch.testing.assert_close(denoiser.sigma_to_t(sigma), t)
    noised = X_START + NOISE * sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(noised, sigma), X_START, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(denoiser.loss(X_START, NOISE, sigma), torch.zeros(3), atol=1e-6, rtol=0)


def test_the_loss_is_of_what_the_network_predicts() -> None:
    silent = nn.Module()
    silent.forward = lambda x, t: torch.zeros_like(x)
    sigma = sigmas_of(ABAR)[T]
    eps = DiscreteEpsDDPMDenoiser(silent, ABAR, quantize=False).loss(X_START, NOISE, sigma)
    torch.testing.assert_close(eps, NOISE.square().mean((1, 2, 3)))
    alpha = ABAR[T].sqrt().view(-1, 1, 1, 1)
    v = alpha * NOISE - (1 - alpha**2).sqrt() * X_START
    torch.testing.assert_close(
        DiscreteVDDPMDenoiser(silent, ABAR, quantize=False).loss(X_START, NOISE, sigma),
        v.square().mean((1, 2, 3)), atol=1e-4, rtol=1e-4,
    )  # fmt: skip


# ---- levels and timesteps --------------------------------------------------------------------------------------


@given(t=st.lists(st.floats(0, 999), min_size=1, max_size=8))
def test_levels_and_timesteps_there_and_back(t: list[float]) -> None:
    times = torch.tensor(t)
    sigma = SCHEDULE.t_to_sigma(times)
    expected = np.exp(np.interp(t, np.arange(1000), np.log(sigmas_of(ABAR).double().numpy())))
    np.testing.assert_allclose(sigma, expected, rtol=1e-4)
    torch.testing.assert_close(SCHEDULE.sigma_to_t(sigma), times, atol=2e-2, rtol=1e-4)
    whole = SCHEDULE.sigma_to_t(sigma, quantize=True)
    distances = (sigma.log() - SCHEDULE.log_sigmas[:, None]).abs()
    assert not whole.is_floating_point()
    torch.testing.assert_close(distances[whole, torch.arange(len(t))], distances.min(0).values, atol=1e-6, rtol=0)


def test_the_ends_of_the_levels() -> None:
    assert SCHEDULE.sigma_to_t(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]
    assert SCHEDULE.sigma_to_t(torch.tensor([[0.5], [5.0]])).shape == (2, 1)
    assert DiscreteSchedule(sigmas_of(ABAR), quantize=True).sigma_to_t(SCHEDULE.sigmas).tolist() == list(range(1000))
    half = SCHEDULE.sigma_to_t(torch.tensor([0.5, 5.0]).half())
    torch.testing.assert_close(half, SCHEDULE.sigma_to_t(torch.tensor([0.5, 5.0])))


@given(n=st.integers(1, 1000))
def test_the_models_own_schedule(n: int) -> None:
    sigmas = SCHEDULE.get_sigmas(n)
    assert sigmas.shape == (n + 1,) and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert float(sigmas[0]) == pytest.approx(float(SCHEDULE.sigma_max))
    assert n == 1 or float(sigmas[-2]) == pytest.approx(float(SCHEDULE.sigma_min))
    gaps = SCHEDULE.sigma_to_t(sigmas[:-1]).diff()
    assert n < 3 or (gaps - gaps.mean()).abs().max() < 0.1


def test_all_of_the_models_own_levels() -> None:
    torch.testing.assert_close(SCHEDULE.get_sigmas(), SCHEDULE.get_sigmas(1000), rtol=1e-5, atol=0)


# ---- against diffusers -----------------------------------------------------------------------------------------


def eps_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return toy(x, t.reshape(-1).expand(len(x)), C)


def v_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same prediction as v, at a timestep between two trained ones."""
    sigma = SCHEDULE.t_to_sigma(t.reshape(-1).expand(len(x))).view(-1, 1, 1, 1)
    alpha = (1 + sigma**2).rsqrt()
    return (eps_of(x, t) - alpha * sigma * x) / alpha


PEERS = [
    ("EulerDiscreteScheduler", "euler", {}),
    ("HeunDiscreteScheduler", "heun", {}),
    ("LMSDiscreteScheduler", "lms", {}),
    ("KDPM2DiscreteScheduler", "dpm_2", {}),
    ("DPMSolverMultistepScheduler", "dpmpp_2m", {"algorithm_type": "dpmsolver++"}),
]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("peer", "name", "settings"), PEERS)
def test_deterministic_samplers_agree_with_diffusers(peer: str, name: str, settings: dict, kind: str) -> None:
    scheduler = getattr(diffusers, peer)(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        use_karras_sigmas=True, prediction_type=kind, **settings,
    )  # fmt: skip
    steps = 12
    scheduler.set_timesteps(steps)
    sigmas = sampling.get_sigmas_karras(steps, float(SCHEDULE.sigma_min), float(SCHEDULE.sigma_max))
    wrapper, model = (DiscreteEpsDDPMDenoiser, eps_of) if kind == "epsilon" else (DiscreteVDDPMDenoiser, v_of)
    start = X_T * sigmas[0]
    made = getattr(sampling, f"sample_{name}")(wrapper(model, ABAR, quantize=False), start, sigmas, disable=True)
    in_vp = name == "dpmpp_2m"  # there x is scaled to the model's own
    x = start * (1 + sigmas[0] ** 2).rsqrt() if in_vp else start
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(seen, precise(scheduler, t)), t, x).prev_sample
    torch.testing.assert_close(made, x, atol=2e-2, rtol=1e-2)


def precise(scheduler: Any, t: torch.Tensor) -> torch.Tensor:
    """The timestep of the level that a scheduler is at; some of them round it."""
    index = scheduler.step_index
    if index is None:
        scheduler._init_step_index(t)
        index = scheduler.step_index
    first_half = getattr(scheduler, "state_in_first_order", True)
    if hasattr(scheduler, "sigmas_interpol") and not first_half:
        sigma = (
            scheduler.sigmas_interpol[index + 1] if hasattr(scheduler, "sigmas_interpol") else scheduler.sigmas[index]
        )
    else:
        sigma = scheduler.sigmas[index]
    return SCHEDULE.sigma_to_t(sigma.reshape(1).float())


def test_noise_is_drawn_and_scaled_as_in_diffusers() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear")
    scheduler.set_timesteps(10)
    x = start = X_T * scheduler.sigmas[0]
    generator = torch.Generator().manual_seed(4)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    noise = sampling.default_noise_sampler(start, torch.Generator().manual_seed(4))
    denoiser = DiscreteEpsDDPMDenoiser(eps_of, ABAR, quantize=True)
    made = sampling.sample_euler_ancestral(denoiser, start, scheduler.sigmas, noise_sampler=noise, disable=True)
    torch.testing.assert_close(made, x, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_the_sde_of_two_steps_agrees_with_diffusers(solver_type: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, 0.00085, 0.012, "scaled_linear", algorithm_type="sde-dpmsolver++", use_karras_sigmas=True,
        solver_type=solver_type, euler_at_final=True,
    )  # fmt: skip
    scheduler.set_timesteps(12)
    sigmas = sampling.get_sigmas_karras(12, float(SCHEDULE.sigma_min), float(SCHEDULE.sigma_max))
    noises = [data(f"noise {i}", X_T.shape) for i in range(12)]
    start, drawn = X_T * sigmas[0], iter(noises)
    made = sampling.sample_dpmpp_2m_sde(
        DiscreteEpsDDPMDenoiser(eps_of, ABAR, quantize=False), start, sigmas, solver_type=solver_type, disable=True,
        noise_sampler=lambda sigma, sigma_next: next(drawn),
    )  # fmt: skip
    x = start * (1 + sigmas[0] ** 2).rsqrt()
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        x = scheduler.step(eps_of(x, precise(scheduler, t)), t, x, variance_noise=noise).prev_sample
    torch.testing.assert_close(made, x, atol=2e-2, rtol=1e-2)


# ---- at home ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_our_sampler_is_k_diffusions_over_its_wrapper(kind: str) -> None:
    model = Model(lambda x, t, cond: toy(x, t, cond))
    if kind == "v":
        model.parameterization = "v"
    wrapper = {"eps": CompVisDenoiser, "v": CompVisVDenoiser}[kind](model)
    sigmas = wrapper.get_sigmas(9)
    start = X_T * (1 + sigmas[0] ** 2).sqrt()
    expected = sampling.sample_dpmpp_2m(wrapper, start, sigmas, extra_args={"cond": C}, disable=True)
    made = run(lambda model: KarrasSampler(model, "uniform", sampler="dpmpp_2m"), model, 9)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_eulers_method_on_the_models_own_levels_is_ddim() -> None:
    """DDIM takes the timesteps 1, 101, ... 901 here; so does Euler's method, when it is given their levels."""
    ddim = DDIMSampler(Model(toy))
    made = run(lambda model: ddim, ddim.model, 10)
    model = Model(toy)

    def at_ddims_levels(model: Model) -> KarrasSampler:
        sampler = KarrasSampler(model, sampler="euler")
        levels = torch.cat([sampler.levels.sigmas[ddim.ddim_timesteps[::-1].copy()], sampler.levels.sigmas[:1]])
        sampler.make_schedule = lambda steps, ddim_eta: vars(sampler).update(steps=10, sigmas=levels)
        return sampler

    euler = run(at_ddims_levels, model, 10)
    torch.testing.assert_close(euler * ABAR[0].sqrt(), made, atol=1e-3, rtol=1e-3)
