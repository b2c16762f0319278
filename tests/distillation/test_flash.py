"""Flash Diffusion against other computations: starts, the teacher's way, every term of the loss, what may change."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler

from ldm.checkpoint import save_checkpoint
from ldm.distillation.adversarial import FORMS, Discriminator, held_still
from ldm.distillation.denoisers import Schedule
from ldm.distillation.distance import Distance
from ldm.distillation.matching import matching_gradient, matching_loss
from ldm.distillation.path import TeacherPath, trailing
from ldm.distillation.start import phase_at, read_phases, start_probabilities
from ldm.errors import UserError
from ldm.models.diffusion.lcm import LCMSampler
from ldm.modules.losses.lpips import LPIPS
from ldm.modules.randomness import SampleRandom
from ldm.util import load_yaml
from tests.distillation.flash_models import BATCH, PHASE, flash, teacher_config
from tests.goldens.fill import data, fill
from tests.models.toys import BETAS, C, Model, toy
from tests.networks import ROOT

ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)

# ---- starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "modes"), [(32, [0, 0, 0.5, 0.5]), (32, [0.4, 0.2, 0.2, 0.2]), (8, [1, 2, 3])])
def test_starts_follow_the_mixture(steps, modes):
    def density(i):
        n = len(modes)
        return sum(w * math.exp(-((i - m * steps / n) ** 2) / 0.5) for m, w in enumerate(modes))

    total = sum(density(i) for i in range(steps))
    expected = [density(i) / total for i in range(steps)]
    assert start_probabilities(steps, modes, 0.5).tolist() == pytest.approx(expected, abs=1e-12)


def test_starts_are_drawn_by_the_batch_and_seldom_elsewhere():
    model = flash(phases=[PHASE | {"modes": [0.5, 0, 0.5, 0]}], teacher_steps=32)
    drawn = []
    for model.batches_seen in range(400):
        drawn.append(model.draw_start(model.phases[0]))
    starts, scales = map(torch.tensor, zip(*drawn, strict=True))
    near = torch.minimum(starts, (starts - 16).abs())
    assert (near <= 2).all() and 120 < int((starts < 8).sum()) < 280
    assert scales.min() >= 2 and scales.max() <= 4 and scales.std() > 0.4
    model.batches_seen = 7
    assert model.draw_start(model.phases[0]) == drawn[7]


def test_phases_follow_one_another():
    phases = read_phases([PHASE | {"steps": 3}, PHASE | {"steps": 2, "matching": 0.7}])
    assert [phase_at(phases, step).matching for step in range(7)] == [0.5, 0.5, 0.5, 0.7, 0.7, 0.7, 0.7]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": "many"}, {"modes": [0, 0]}, {"modes": 3}, {"matching": -1}, {"dmd": 1}]
)
def test_phases_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match=r"phases\[0\]"):
        read_phases([PHASE | wrong])


def test_the_yaml_has_the_published_values():
    config = load_yaml(ROOT / "configs/distill/flash-sd.yaml")
    params = config.model.params
    phases = read_phases(params.phases)
    assert (params.teacher_steps, params.variance, params.guidance) == (32, 0.5, [3, 13])
    assert (params.distillation_loss, params.adversarial_form, params.lora_config.rank) == ("lpips", "lsgan", 128)
    assert params.adversarial_timesteps == [10, 250, 500, 750]
    assert (config.model.base_learning_rate, config.data.params.batch_size) == (1e-5, 4)
    assert config.lightning.trainer.max_steps == sum(phase.steps for phase in phases)
    assert [p.modes for p in phases] == [(0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2)]
    assert [(p.steps, p.distillation) for p in phases] == [(5000, 1)] * 4
    assert [p.adversarial for p in phases] == [0, 0.1, 0.2, 0.3] and [p.matching for p in phases] == [0, 0.3, 0.5, 0.7]
    v1 = load_yaml(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params
    for part in ("unet_config", "cond_stage_config", "scale_factor", "linear_start", "linear_end"):
        assert params.teacher_config.params[part] == v1[part]


# ---- the teacher's way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3, 31])
def test_the_way_is_diffusers_dpm_solver(start):
    scheduler = DPMSolverMultistepScheduler(
        1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(32)
    model = Model(toy)
    path = TeacherPath(Schedule(ABAR.sqrt(), (1 - ABAR).sqrt()), 32)
    assert path.timesteps == trailing(1000, 32) == scheduler.timesteps.tolist()

    def predict(x, t):
        a = ABAR[t].view(-1, 1, 1, 1)
        return ((x - (1 - a).sqrt() * toy(x, t, C)) / a.sqrt()).float()

    x = path.begin(data("x0", (2, 4, 8, 8)), data("noise", (2, 4, 8, 8)), start)
    ours = path(predict, x, start)
    scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(model.apply_model(x, t.expand(2), C), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-3)


def test_the_way_begins_at_pure_noise_or_between():
    path = TeacherPath(Schedule(ABAR.sqrt(), (1 - ABAR).sqrt()), 4)
    x_start, noise = data("x0", (1, 4)), data("noise", (1, 4))
    assert torch.equal(path.begin(x_start, noise, 0), noise)
    expected = ABAR[499].sqrt() * x_start + (1 - ABAR[499]).sqrt() * noise
    torch.testing.assert_close(path.begin(x_start, noise, 2), expected.float())
    assert BETAS.shape == (1000,)


# ---- terms of the loss ------------------------------------------------------------------------------------


def raw_x0(model, x, t, c, kind):
    """x_0 from a network's output by hand."""
    a = ABAR[t].view(-1, 1, 1, 1)
    out = model.model.diffusion_model(x, t, context=c)
    return (a.sqrt() * x - (1 - a).sqrt() * out if kind == "v" else (x - (1 - a).sqrt() * out) / a.sqrt()).float()


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_the_terms_of_a_step_by_hand(kind):
    model = flash(teacher_config(parameterization=kind), distillation_loss="l1")
    model.batches_seen = 5
    loss, logs = model.shared_step(BATCH, SampleRandom(0, 5, 0, 3, "cpu"))
    random = SampleRandom(0, 5, 0, 3, "cpu")
    z = BATCH["image"].permute(0, 3, 1, 2)
    c, empty = (model.teacher.cond_stage_model(texts) for texts in (BATCH["caption"], [""] * 3))
    start, scale = model.draw_start(model.phases[0])
    t = torch.full((3,), model.path.timesteps[start])
    x = model.path.begin(z, random.randn_like(z), start)

    def guided(x, t):
        full, without = (raw_x0(model.teacher, x, t, condition, kind) for condition in (c, empty))
        return without + scale * (full - without)

    with torch.no_grad():
        time = 10.0 * t[0]
        skip, out = 0.25 / (time**2 + 0.25), time / (time**2 + 0.25).sqrt()
        output = skip * x + out * raw_x0(model.student, x, t, c, kind)
        target = model.path(guided, x, start)
        expected = {"distillation": (output - target).abs().mean()}
        t, noise = random.randint(1000), random.randn_like(z)
        a = ABAR[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * output + (1 - a).sqrt() * noise).float()
        real, fake = guided(noisy, t), raw_x0(model.student, noisy, t, c, kind)
        distance = (output - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        expected["matching"] = 0.5 * ((fake - real) / distance).square().mean()
        t, noise = torch.tensor([10, 250, 500, 750])[random.randint(4)], random.randn_like(z)
        a = ABAR[t].view(-1, 1, 1, 1)
        seen = []
        hook = model.teacher.model.diffusion_model.middle_block.register_forward_hook(
            lambda *args: seen.append(args[2])
        )
        for latents in (z, output):
            noisy = (a.sqrt() * latents + (1 - a).sqrt() * noise).float()
            model.teacher.model.diffusion_model(noisy, t, context=c)
        hook.remove()
        on_real, on_fake = map(model.discriminator, seen)
        expected["adversarial"] = 0.5 * (on_fake - 1).square().mean()
        expected["discriminator"] = 0.5 * ((on_real - 1).square().mean() + on_fake.square().mean())
    for name, value in expected.items():
        torch.testing.assert_close(logs[f"train/{name}"], value, rtol=2e-3, atol=1e-5)
    weights = {"distillation": 0.9, "matching": 0.5, "adversarial": 0.3}
    total = sum(weight * expected[name] for name, weight in weights.items())
    torch.testing.assert_close(logs["train/loss"], total, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(loss.detach(), total + expected["discriminator"], rtol=2e-3, atol=1e-5)


def test_matching_moves_samples_towards_the_teachers():
    output, real, fake = (data(name, (2, 3, 4)).requires_grad_(name == "output") for name in ("output", "real", "fake"))
    (gradient,) = torch.autograd.grad(matching_loss(output, real, fake), output)
    for i in range(2):
        by_hand = (fake[i] - real[i]) / (output[i] - real[i]).abs().sum() * 12 / output.numel()
        torch.testing.assert_close(gradient[i], by_hand)
    torch.testing.assert_close(gradient * output.numel(), matching_gradient(output, real, fake))
    # in terms of the noise: (eps_real - eps_fake) sigma / alpha, since x = alpha x_0 + sigma eps
    alpha, sigma, x = 0.8, 0.6, data("x", (2, 3, 4))
    eps_real, eps_fake = ((x - alpha * x0) / sigma for x0 in (real, fake))
    torch.testing.assert_close((eps_real - eps_fake) * sigma / alpha, fake - real)


def test_forms_of_the_adversarial_loss():
    real, fake = data("real", (5,)), data("fake", (5,))
    ones, zeros, entropy = torch.ones(5), torch.zeros(5), F.binary_cross_entropy_with_logits
    both = 0.5 * (entropy(real, ones) + entropy(fake, zeros))
    expected = {
        "lsgan": (0.5 * F.mse_loss(fake, ones), 0.5 * (F.mse_loss(real, ones) + F.mse_loss(fake, zeros))),
        "wgan": (-fake.mean(), fake.mean() - real.mean()),
        "hinge": (-fake.mean(), 0.5 * ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean()),
        "non-saturating": (entropy(fake, ones), both),
        "vanilla": ((1 - fake.sigmoid()).log().mean(), both),
    }
    assert set(expected) == set(FORMS)
    for name, (generator, discriminator) in expected.items():
        torch.testing.assert_close(FORMS[name].generator(fake), generator)
        torch.testing.assert_close(FORMS[name].discriminator(real, fake), discriminator)


def test_student_and_discriminator_each_learn_from_their_own_loss():
    model = flash()
    trained = [p for p in model.student.parameters() if p.requires_grad]
    z, c, _ = model.seen_teacher.inputs(BATCH, SampleRandom(0, 0, 0, 3, "cpu"))
    output = model.predict(z, torch.full((3,), 400), c)
    term, judged = model.adversarial(output, z, c, SampleRandom(0, 0, 0, 3, "cpu"), teaches=True)
    head = list(model.discriminator.parameters())
    assert all(g is None for g in torch.autograd.grad(term, head, retain_graph=True, allow_unused=True))
    grads = torch.autograd.grad(judged["discriminator"], trained, retain_graph=True, allow_unused=True)
    assert all(g is None for g in grads)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(term, trained, retain_graph=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(judged["discriminator"], head))


def test_a_held_module_takes_its_gradients_again():
    head = Discriminator(32, 32)
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    with held_still(head):
        through = head(x)
    (through.mean() + head(x).mean()).backward()
    assert head[0].weight.grad is not None and x.grad is not None and through.shape == (1, 1, 2, 2)


def test_lpips_looks_at_the_middle_of_what_is_decoded(tmp_path):
    model = fill(LPIPS())
    state = {f"loss.perceptual_loss.{key}": value.contiguous() for key, value in model.state_dict().items()}
    path: Path = tmp_path / "kl.safetensors"
    save_checkpoint(state, path)
    distance = Distance("lpips", str(path))
    output, target = data("a", (2, 4, 72, 80)).requires_grad_(), data("b", (2, 4, 72, 80))
    value = distance(output, target, lambda z: z[:, :3].tanh())
    model.load_state_dict(distance.lpips.state_dict())
    cut = [x[:, :3, 4:68, 8:72].tanh() for x in (target, output)]
    torch.testing.assert_close(value, model(*cut).mean())
    value.backward()
    assert output.grad[:, :3, 4:68, 8:72].abs().sum() > 0 and output.grad[:, :, :4].abs().sum() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"distillation_loss": "l3"},
        {"distillation_loss": "lpips"},
        {"adversarial_form": "x"},
        {"adversarial_timesteps": [1000]},
        {"guidance": [3.0]},
        {"guidance": 3.0},
        {"phases": 3},
        {"guidance": [4.0, 3.0]},
        {"variance": 0},
        {"teacher_steps": 0},
        {"lora_config": {"init": "pissa"}},
        {"lora_config": {"targets": ["nothing"]}},
        {"lora_config": {"alpha": -3}},
        {"lora_config": {"rank": 0}},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match="yaml"):
        flash(**wrong)


# ---- teacher and student ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_changes_the_lora_and_the_head_alone(checkpointed):
    model = flash(teacher_config({"use_checkpoint": checkpointed}))
    model.learning_rate = 1e-2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = model.make_optimizer(fused=False)
    for model.batches_seen in range(2):
        loss, _ = model.shared_step(BATCH, model.step_random(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert all(".lora_" in name or name.startswith("discriminator.") for name in trained)
    layers = {name.partition(".lora_")[0].rpartition(".attn")[2][2:] for name in trained if ".lora_" in name}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for checkpointed in (False, True):
        model = flash(teacher_config({"use_checkpoint": checkpointed}))
        model.discriminator = fill(model.discriminator)
        loss, _ = model.shared_step(BATCH, SampleRandom(0, 0, 0, 3, "cpu"))
        gradients.append(torch.autograd.grad(loss, [p for p in model.student.parameters() if p.requires_grad]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_new_student_draws_what_the_teacher_draws():
    model = flash()
    teacher = copy.deepcopy(model.teacher.state_dict())
    model.student = None
    model.make_student()
    x, t, c = data("x", (2, 4, 8, 8)), torch.tensor([3, 900]), data("c", (2, 6, 24))
    assert torch.equal(model.student.apply_model(x, t, c), model.teacher.apply_model(x, t, c))
    own = dict(model.student.named_parameters())
    for name, parameter in model.teacher.named_parameters():
        layer, _, kind = name.rpartition(".")
        assert own.get(name, own.get(f"{layer}.base_layer.{kind}")) is parameter  # no second copy of the weights
    assert all(torch.equal(value, teacher[name]) for name, value in model.teacher.state_dict().items())


@pytest.mark.parametrize("unet", [{"use_middle_block": False}, {"use_linear_in_transformer": True}])
def test_other_networks_can_be_teachers(unet):
    model = flash(teacher_config(unet))
    loss, _ = model.shared_step(BATCH, SampleRandom(0, 0, 0, 3, "cpu"))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())
    features = model.seen_teacher.features(data("x", (1, 4, 8, 8)), torch.tensor([5]), data("c", (1, 6, 24)))
    assert features.shape == (1, model.seen_teacher.feature_channels, 4, 4)


def test_pictures_stand_beside_the_teachers():
    model = flash()
    model.eval()
    pictures = model.log_images(BATCH, N=2, teacher_steps=3)["teacher_3_student_4_2_1"]
    assert pictures.shape == (2, 4, 8, 32)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    c = model.student.get_learned_conditioning(BATCH["caption"][:2])
    with torch.no_grad():
        own, _ = LCMSampler(model.student).sample(2, 2, (4, 8, 8), c, generator=generators, show_progress=False)
    torch.testing.assert_close(pictures[..., 16:24], own)
