"""The samplers against the originals' outputs, diffusers' schedulers, and an exactly solvable model."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import ddim_timesteps
from tests.goldens.fill import data
from tests.models.toys import BETAS, QUIET, UC, X_T, C, Model, assert_golden, run, toy

SAMPLERS = [DDIMSampler, PLMSSampler, DPMSolverSampler]


def test_outputs_of_the_originals():
    assert_golden(run(DDIMSampler, Model(toy), 20, 7.5), "ddim_S20_s7.5_e0.0")
    torch.manual_seed(3)
    assert_golden(run(DDIMSampler, Model(toy), 20, 1.0, eta=1.0), "ddim_S20_s1.0_e1.0")
    assert_golden(run(PLMSSampler, Model(toy), 20, 7.5), "plms_S20_s7.5")
    assert_golden(run(DPMSolverSampler, Model(toy), 20, 7.5), "dpm_S20_s7.5")


def test_img2img_of_the_original():
    sampler = DDIMSampler(Model(toy))
    sampler.make_schedule(50, ddim_eta=0.0, verbose=False)
    x0, noise = data("x0", (2, 4, 8, 8), 0.7), data("nz", (2, 4, 8, 8))
    x = sampler.stochastic_encode(x0, torch.tensor([37, 37]), noise=noise)
    assert_golden(x, "enc_0.75")
    x = sampler.decode(x, C, 37, unconditional_guidance_scale=5.0, unconditional_conditioning=UC, show_progress=False)
    assert_golden(x, "i2i_0.75")


def as_prediction(kind):
    """The toy model's noise, given as x_0 or v."""
    abar = torch.cumprod(1 - BETAS, 0).float()

    def formula(x, t, c):
        a = abar[t.round().long()].view(-1, 1, 1, 1)
        eps = toy(x, t, c)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]

    return formula


@pytest.mark.parametrize("kind", ["x0", "v"])
@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_predictions_of_every_kind_give_the_same_samples(sampler, kind):
    model = Model(as_prediction(kind))
    model.parameterization = kind
    torch.testing.assert_close(run(sampler, model, 10), run(sampler, Model(toy), 10), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_agrees_with_diffusers(kind):
    peer = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type=kind,
    )  # fmt: skip
    peer.set_timesteps(25)
    formula = as_prediction("v" if kind == "v_prediction" else "eps")
    x = X_T
    for t in peer.timesteps:
        x = peer.step(formula(x, t.expand(2), C), t, x).prev_sample
    model = Model(formula)
    model.parameterization = "v" if kind == "v_prediction" else "eps"
    torch.testing.assert_close(run(DDIMSampler, model, 25), x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler, order", [(DDIMSampler, 1), (DPMSolverSampler, 2)])
def test_error_on_a_gaussian_falls_as_the_order_says(sampler, order):
    """Data of standard deviation 0.5: eps is linear in x, and the exact ODE solution only scales x."""
    betas = BETAS.clone()
    betas[0] = 0.3  # so that the last step's log-SNR is no leap
    abar = torch.cumprod(1 - betas, 0)
    spread = 0.5

    def log_alpha(t):
        return np.interp((t + 1) / 1000, np.arange(1, 1001) / 1000, 0.5 * torch.log(abar).numpy())

    def formula(x, t, c):
        a2 = torch.tensor(np.exp(2 * log_alpha(t.double().numpy()))).float().view(-1, 1, 1, 1)
        return (1 - a2).sqrt() * x / (a2 * spread**2 + 1 - a2)

    def exact(x, t_from, t_to):
        std = [np.sqrt(np.exp(2 * log_alpha(t)) * (spread**2 - 1) + 1) for t in (t_from, t_to)]
        return x * std[1] / std[0]

    errors = []
    for S in (20, 40, 80):
        model = Model(formula)
        model.betas, model.alphas_cumprod = betas.float(), abar.float()
        end = run(sampler, model, S)
        first = ddim_timesteps(S, 1000)[-1] if sampler is DDIMSampler else 999
        errors.append(float((end - exact(X_T, first, 0)).abs().max()))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (rates > order - 0.4).all(), (errors, rates)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(sampler):
    eta = {"eta": 1.0} if sampler is DDIMSampler else {}

    def draw(seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        kwargs = dict(x_T=None, generator=generators, conditioning=C[:1].expand(len(seeds), -1, -1)) | eta
        return sampler(Model(toy)).sample(5, len(seeds), (4, 8, 8), **kwargs, **QUIET)[0]

    alone, together = draw([7]), draw([3, 7, 9])
    torch.testing.assert_close(together[1:2], alone, atol=0, rtol=0)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_one_and_guidance_calls(sampler):
    model = Model(toy)
    instance = sampler(model)
    instance.make_schedule(10)
    x = instance.stochastic_encode(torch.zeros(2, 4, 8, 8), torch.tensor([10, 10]), noise=X_T)
    assert instance.decode(x, C, 10, show_progress=False).isfinite().all()
    batches = []
    model.apply_model = lambda x, t, c: (batches.append(len(x)), toy(x, t, c))[1]
    run(sampler, model, 4, 1.0), run(sampler, model, 4, 3.0)
    assert set(batches[: len(batches) // 2]) == {2} and set(batches[len(batches) // 2 :]) == {4}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_known_region_stays(sampler):
    x0 = torch.full((2, 4, 8, 8), 3.0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    _, inter = sampler(Model(lambda x, t, c: torch.zeros_like(x))).sample(
        20, 2, (4, 8, 8), C, x_T=X_T, mask=mask, x0=x0, log_every_t=1, **QUIET
    )
    assert (inter["pred_x0"][-1][..., :4] - 3.0).abs().max() < 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(sampler, steps):
    with pytest.raises(UserError, match="sampling steps"):
        run(sampler, Model(toy), steps)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 999, 1000])
def test_timesteps_stay_within_the_trained_ones(steps):
    chosen = ddim_timesteps(steps, 1000)
    assert len(chosen) >= min(steps, 999) and chosen[0] in (0, 1) and chosen[-1] < 1000
    assert (np.diff(chosen) > 0).all()
    assert run(DDIMSampler, Model(toy), steps).isfinite().all()


def test_ddim_timesteps_of_the_original():
    assert (ddim_timesteps(20, 1000) == np.load("tests/goldens/modules.npz")["ddimt_uniform_20"]).all()


def test_stochasticity_is_refused_where_there_is_none():
    for sampler in (PLMSSampler, DPMSolverSampler):
        with pytest.raises(UserError, match="ddim_eta"):
            run(sampler, Model(toy), 5, eta=0.5)
