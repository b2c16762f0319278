"""The latent-consistency sampler against diffusers' LCMScheduler."""

import pytest
import torch
from diffusers import LCMScheduler

from ldm.errors import UserError
from ldm.models.diffusion.lcm import LCMSampler, boundary
from tests.models.test_samplers import as_prediction
from tests.models.toys import QUIET, UC, C, Model, run, toy


def peer(kind="epsilon", **settings):
    return LCMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=kind, clip_sample=False, **settings)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_samples_are_diffusers(steps, kind):
    formula = as_prediction("v" if kind == "v_prediction" else "eps")
    scheduler, seeds = peer(kind), (3, 8)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    for t in scheduler.timesteps:
        x = scheduler.step(formula(x, t.expand(2), C), t, x, generator=generators).prev_sample
    model = Model(formula)
    model.parameterization = "v" if kind == "v_prediction" else "eps"
    own = run(LCMSampler, model, steps, x_T=None, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    torch.testing.assert_close(own, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("original_steps", [50, 32])
@pytest.mark.parametrize("steps", [1, 3, 4, 11, 32])
def test_timesteps_and_boundary_are_diffusers(steps, original_steps):
    sampler, scheduler = LCMSampler(Model(None), original_steps=original_steps), peer()
    sampler.make_schedule(steps)
    scheduler.set_timesteps(steps, original_inference_steps=original_steps)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    for t in (*sampler.timesteps, torch.tensor(0)):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert [float(c) for c in boundary(t)] == pytest.approx([float(c) for c in theirs], abs=1e-7)


def test_a_picture_does_not_depend_on_its_batch():
    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        condition = C[:1].expand(len(seeds), -1, -1)
        return LCMSampler(Model(toy)).sample(3, len(seeds), (4, 8, 8), condition, generator=generators, **QUIET)[0]

    assert torch.equal(draw([3, 7, 9])[1:2], draw([7]))


def test_image_to_image_takes_the_last_steps():
    asked = []
    sampler = LCMSampler(Model(lambda x, t, c: (asked.append(int(t[0])), torch.zeros_like(x))[1]))
    sampler.make_schedule(4)
    x = sampler.stochastic_encode(torch.ones(2, 4, 8, 8), torch.tensor([2, 2]), noise=torch.zeros(2, 4, 8, 8))
    level = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[499].sqrt()
    torch.testing.assert_close(x, torch.full_like(x, float(level)))
    sampler.generator = torch.Generator().manual_seed(0)
    sampler.decode(x, C, 2, unconditional_conditioning=UC, show_progress=False)
    assert asked == [499, 259]


@pytest.mark.parametrize(("steps", "settings"), [(0, {}), (51, {}), (4, {"eta": 0.5})])
def test_what_cannot_be_is_refused(steps, settings):
    with pytest.raises(UserError, match=r"sampling steps|eta"):
        run(LCMSampler, Model(None), steps, **settings)
