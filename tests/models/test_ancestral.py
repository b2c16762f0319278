"""The full ancestral process against diffusers' DDPM scheduler, noise for noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.errors import UserError
from ldm.models.diffusion.ancestral import AncestralSampler
from tests.models.toys import BETAS, X_T, C, Model, run, toy


class Short(Model):
    """Every 50th of the schedule's betas, made larger: 20 timesteps."""

    num_timesteps = 20

    def __init__(self, parameterization: str, clip_denoised: bool) -> None:
        super().__init__(toy)
        self.parameterization, self.clip_denoised = parameterization, clip_denoised
        betas = BETAS[::50] * 20
        self.betas, self.alphas_cumprod = betas.float(), torch.cumprod(1 - betas, 0).float()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_agrees_with_diffusers(kind: str, theirs: str, clip: bool) -> None:
    model = Short(kind, clip)
    ours = run(lambda m: AncestralSampler(m), model, 20, generator=torch.Generator().manual_seed(3))
    peer = DDPMScheduler(20, trained_betas=model.betas.numpy(), prediction_type=theirs, clip_sample=clip)
    generator, x = torch.Generator().manual_seed(3), X_T
    peer.set_timesteps(20)
    for t in peer.timesteps:
        x = peer.step(toy(x, t.expand(2), C), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_a_picture_depends_on_its_own_generator_alone() -> None:
    def draw(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = dict(conditioning=C[: len(seeds)], generator=generators, show_progress=False)
        return AncestralSampler(Short("eps", False)).sample(None, len(seeds), (4, 8, 8), **start)[0]

    torch.testing.assert_close(draw(5, 6)[1:], draw(6, 6)[1:])
    assert not torch.equal(draw(5), draw(6))


def test_it_has_all_the_timesteps_or_none() -> None:
    with pytest.raises(UserError, match="19.* has 20"):
        run(AncestralSampler, Short("eps", False), 19)
