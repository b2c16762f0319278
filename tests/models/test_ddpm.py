"""The diffusion modules against diffusers' schedulers and against the formulas written out."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import UserError
from tests.goldens.fill import data

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": dict(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1], num_res_blocks=1,
        channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=16, legacy=False,
    ),
}  # fmt: skip
SD = dict(linear_start=0.00085, linear_end=0.0120, timesteps=1000)


class Words(nn.Module):
    """A text encoder of one embedding a character."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 16)

    def forward(self, texts):
        return self.table(torch.tensor([[ord(c) % 256 for c in t.ljust(6)[:6]] for t in texts]))


def latent_diffusion(**params):
    torch.manual_seed(0)
    cond = {"target": f"{__name__}.Words"} if params.get("conditioning_key") == "crossattn" else "__is_unconditional__"
    unet = {**UNET, "params": {**UNET["params"], **params.pop("unet", {})}}
    if cond == "__is_unconditional__":
        unet["params"].update(use_spatial_transformer=False, context_dim=None)
    stage = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    settings = dict(image_size=8, channels=4, cond_stage_key="caption", **SD) | params
    return LatentDiffusion(first_stage_config=stage, cond_stage_config=cond, unet_config=unet, **settings)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__))
    sys.modules[__name__].Words = Words


@pytest.mark.parametrize("parameterization, kind", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_schedule_agrees_with_diffusers(parameterization, kind):
    model = latent_diffusion(parameterization=parameterization)
    peer = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=kind, clip_sample=False)
    torch.testing.assert_close(model.alphas_cumprod, peer.alphas_cumprod)
    x, noise, t = data("x", (3, 4, 8, 8)), data("noise", (3, 4, 8, 8)), torch.tensor([1, 500, 999])
    x_t = model.q_sample(x, t, noise)
    torch.testing.assert_close(x_t, peer.add_noise(x, noise, t))
    torch.testing.assert_close(model.get_v(x, noise, t), peer.get_velocity(x, noise, t))
    target = model.training_target(x, noise, t)
    torch.testing.assert_close(model.predict_start(x_t, t, target), x, atol=2e-3, rtol=1e-3)
    mean, variance, _ = model.q_posterior(x, x_t, t)
    for i, step in enumerate(t):
        out = peer.step(target[i : i + 1], int(step), x_t[i : i + 1], generator=torch.Generator().manual_seed(0))
        draw = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(mean[i : i + 1] + variance[i].sqrt() * draw, out.prev_sample, atol=2e-3, rtol=1e-3)


def test_loss_is_the_mean_squared_error_with_logvar_and_elbo():
    model = latent_diffusion(learn_logvar=True, logvar_init=0.3, original_elbo_weight=0.5, use_ema=False).train()
    x, noise, t = data("x", (3, 4, 8, 8)), data("noise", (3, 4, 8, 8)), torch.tensor([0, 500, 999])
    loss, logs = model.p_losses(x, None, t, noise=noise)
    error = ((model.apply_model(model.q_sample(x, t, noise), t) - noise) ** 2).mean(dim=(1, 2, 3))
    betas, abar = model.betas.double(), model.alphas_cumprod.double()
    previous = torch.cat([torch.ones(1).double(), abar[:-1]])
    weights = betas**2 / (2 * (betas * (1 - previous) / (1 - abar)) * (1 - betas) * (1 - abar))
    weights[0] = weights[1]
    expected = (error / np.exp(0.3) + 0.3).mean() + 0.5 * (weights[t].float() * error).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    assert {"train/loss", "train/loss_simple", "train/loss_vlb"} <= set(logs)
    loss.backward()
    assert model.logvar.grad.abs().sum() > 0


def test_state_dict_holds_what_compvis_checkpoints_hold():
    keys = set(latent_diffusion(scale_by_std=True).state_dict())
    assert {"betas", "alphas_cumprod", "posterior_mean_coef2", "scale_factor", "model_ema.decay"} <= keys
    assert "model.diffusion_model.time_embed.0.weight" in keys and "lvlb_weights" not in keys and "logvar" not in keys


def test_conditions_reach_the_network_each_their_own_way():
    x, t = data("x", (2, 4, 8, 8)), torch.tensor([3, 900])
    context = data("c", (2, 6, 16))
    model = latent_diffusion(conditioning_key="crossattn").eval()
    unet = model.model.diffusion_model
    for p in unet.parameters():
        nn.init.normal_(p, std=0.05)
    with torch.no_grad():
        expected = unet(x, t, context=context)
        for cond in (context, [context], {"c_crossattn": [context]}):
            assert torch.equal(model.apply_model(x, t, cond), expected)
        assert not torch.equal(model.apply_model(x, t, 2 * context), expected)


def test_ema_scope_swaps_and_restores():
    model = latent_diffusion()
    weight = model.model.diffusion_model.out[2].bias
    with torch.no_grad():
        weight.fill_(7.0)
    with model.ema_scope():
        assert not torch.equal(weight, torch.full_like(weight, 7.0))
    assert torch.equal(weight, torch.full_like(weight, 7.0))


def test_scale_by_std_makes_the_first_batch_unit():
    model = latent_diffusion(scale_by_std=True)
    batch = {"image": 5 * torch.randn(16, 8, 8, 4)}
    model.on_train_batch_start(batch, 0)
    assert model.get_latents(batch).std() == pytest.approx(1.0, abs=1e-4)
    model.batches_seen = 1
    model.on_train_batch_start({"image": torch.randn(16, 8, 8, 4)}, 0)
    assert model.get_latents(batch).std() == pytest.approx(1.0, abs=1e-4)


def test_training_noise_depends_on_seed_step_and_sample_alone():
    model = latent_diffusion(conditioning_key="crossattn", ucg_training={"caption": {"p": 0.5}}).train()
    batch = {"image": torch.randn(4, 8, 8, 4), "caption": ["a", "b", "c", "d"]}
    losses = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        losses.append(model.shared_step(batch, model.step_random(4))[0])
    assert losses[0] == losses[1]
    model.batches_seen += 1
    assert model.shared_step(batch, model.step_random(4))[0] != losses[0]


def test_pixel_ddpm_samples_and_refuses_bad_settings():
    unet = {**UNET, "params": {**UNET["params"], "use_spatial_transformer": False, "context_dim": None}}
    model = DDPM(unet, image_size=8, channels=4, timesteps=20).eval()
    assert model.sample(2).shape == (2, 4, 8, 8)
    assert model.log_images({"image": torch.zeros(1, 8, 8, 4)})["samples"].shape == (1, 4, 8, 8)  # 50 steps by default
    for bad in ({"parameterization": "noise"}, {"loss_type": "l3"}, {"conditioning_key": "film"}):
        with pytest.raises(UserError, match=next(iter(bad))):
            DDPM(unet, **bad)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_min_snr_weighs_the_same_error_of_x0_alike_however_it_is_predicted(parameterization):
    gamma = 5.0
    model = latent_diffusion(parameterization=parameterization, min_snr_gamma=gamma, use_ema=False)
    x, noise, t = data("x", (4, 4, 8, 8)), data("noise", (4, 4, 8, 8)), torch.tensor([0, 100, 500, 999])
    x_t = model.q_sample(x, t, noise)
    off = model.training_target(x, noise, t) + 0.1 * data("error", (4, 4, 8, 8))
    error_of_x0 = ((model.predict_start(x_t, t, off) - x) ** 2).mean(dim=(1, 2, 3))
    abar = model.alphas_cumprod[t].double()
    expected = (torch.clamp(abar / (1 - abar), max=gamma) * error_of_x0).mean()
    total, logs = model.weigh_loss(model.get_loss(off, model.training_target(x, noise, t)), t, "train")
    torch.testing.assert_close(total.double(), expected, rtol=1e-3, atol=1e-9)
    assert logs["train/loss_simple"] == pytest.approx(
        float((0.1 * data("error", (4, 4, 8, 8))).square().mean()), rel=1e-3
    )


def test_sample_pictures_start_from_the_same_noise_and_show_the_prompts_that_are_given():
    model = latent_diffusion(conditioning_key="crossattn", timesteps=20, use_ema=False).eval()
    for p in model.model.parameters():
        nn.init.normal_(p, std=0.05)
    batch = {"image": torch.randn(2, 8, 8, 4), "caption": ["a", "b"]}
    options = dict(ddim_steps=2, unconditional_guidance_scale=1.0)
    torch.manual_seed(1)
    first = model.log_images(batch, **options)["samples"]
    torch.manual_seed(2)
    assert torch.equal(model.log_images(batch, **options)["samples"], first)
    assert not torch.equal(model.log_images(batch, seed=1, **options)["samples"], first)
    prompted = model.log_images(batch, prompts=["b", "a", "c"], **options)["samples"]
    assert len(prompted) == 3 and not torch.equal(prompted[:2], first)


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluation_takes_the_averaged_weights_or_the_trained_ones(evaluate):
    model = latent_diffusion(evaluate_ema=evaluate)
    weight = model.model.diffusion_model.out[2].bias
    with torch.no_grad():
        weight.fill_(7.0)
    with model.evaluation_scope():
        assert torch.equal(weight, torch.full_like(weight, 7.0)) is not evaluate
