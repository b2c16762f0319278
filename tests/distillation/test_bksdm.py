"""Block-wise distillation: the loss against diffusers' networks, and a teacher that is no part of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.distillation.bksdm import DistilledDiffusion
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.randomness import SampleRandom
from ldm.weight_files import write_tensors
from tests.distillation.test_pruning import CUTS, NARROW, PAIRS, in_diffusers, their_outputs
from tests.goldens.fill import data, fill
from tests.networks import TIMESTEPS, relative_error

LITTLE: dict[str, Any] = {"channel_mult": [1, 1], "num_res_blocks": 1}  # a teacher's
CUT: dict[str, Any] = {"channel_mult": [1], "num_res_blocks": 1, "use_middle_block": False}  # and its student's
NOISES = {"target": "ldm.modules.noise.ImmiscibleNoise", "params": {"method": "knn", "k": 4}}


class Words(nn.Module):
    """A text encoder of one embedding a character."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 24)

    def forward(self, texts: list[str]) -> torch.Tensor:
        return self.table(torch.tensor([[ord(c) % 256 for c in t.ljust(6)[:6]] for t in texts]))


def diffusion(kind: type = DistilledDiffusion, unet: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A small latent diffusion model on the pixels of 8x8 pictures, its weights a function of their names."""
    model = kind(
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        cond_stage_config={"target": f"{__name__}.Words"},
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": NARROW | (unet or {})},
        **dict(image_size=8, channels=4, cond_stage_key="caption", conditioning_key="crossattn", use_ema=False)
        | settings,
    )
    if not settings.get("ckpt_path"):
        fill(model.model)
        fill(model.cond_stage_model)
    return model


def write_teacher(folder: Path, unet: dict[str, Any]) -> Path:
    write_tensors(diffusion(LatentDiffusion, unet).state_dict(), folder / "teacher.safetensors", "safetensors")
    return folder / "teacher.safetensors"


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"), LITTLE)


def student(path: Path, unet: dict[str, Any] = CUT, **settings: Any) -> DistilledDiffusion:
    """Cut out of the teacher in a file, which it learns from."""
    model = diffusion(unet=unet, ckpt_path=str(path), **settings)
    model.setup_teacher()
    return model.train()


@pytest.mark.parametrize("name", CUTS)
def test_the_loss_is_that_of_the_paper(name: str, tmp_path: Path) -> None:
    model = student(write_teacher(tmp_path, {}), CUTS[name], output_weight=0.5, feature_weight=0.25)
    networks = (model.model, NARROW | CUTS[name]), (model.teacher.network, NARROW)
    x, noise, context = data("x", (2, 4, 16, 16)), data("noise", (2, 4, 16, 16)), data("c", (2, 5, 24))
    loss, logs = model.p_losses(x, context, TIMESTEPS, noise)
    x_noisy = model.q_sample(x, TIMESTEPS, noise)
    outputs: list[torch.Tensor] = []
    features: list[dict[str, torch.Tensor]] = []
    for side, (network, params) in enumerate(networks):
        peer = in_diffusers(network.diffusion_model, params)
        features.append(their_outputs(peer, {pair[side] for pair in PAIRS[name]}))
        with torch.no_grad():
            outputs.append(peer(x_noisy, TIMESTEPS, encoder_hidden_states=context).sample)
    task, output = F.mse_loss(outputs[0], noise), F.mse_loss(*outputs)
    feature = sum(F.mse_loss(features[0][here], features[1][there]) for here, there in PAIRS[name])
    expected = {"loss_simple": task, "loss_output": output, "loss_features": feature,
                "loss": task + 0.5 * output + 0.25 * feature}  # fmt: skip
    for key, value in expected.items():
        torch.testing.assert_close(logs[f"train/{key}"], value, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss.detach(), logs["train/loss"])
    loss.backward()
    still = [name for name, p in model.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still  # with 8x8 pictures: what attention weighs one single place by
    assert all(p.grad is None for p in model.teacher.network.parameters())


def test_the_teacher_is_no_part_of_the_student(teacher_file: Path) -> None:
    model = student(teacher_file, use_ema=True)
    plain = diffusion(LatentDiffusion, CUT, use_ema=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(model.trainable_parameters()) == len(plain.trainable_parameters())
    for name, shadow in model.model_ema.m_name2s_name.items():  # the average begins with what was cut out
        assert torch.equal(getattr(model.model_ema, shadow), model.model.get_parameter(name))
    plain.load_state_dict(model.state_dict())
    assert not model.teacher.network.train().diffusion_model.training
    x = data("x", (2, 4, 8, 8))
    arguments = x, TIMESTEPS, data("c", (2, 5, 24))
    assert torch.equal(model.apply_model(*arguments), plain.apply_model(*arguments))


def test_without_weights_there_is_no_teacher_and_the_loss_is_the_tasks(teacher_file: Path) -> None:
    model = student(teacher_file, output_weight=0, feature_weight=0)
    assert model.teacher is None
    plain = diffusion(LatentDiffusion, CUT)
    plain.load_state_dict(model.state_dict())
    batch = {"image": data("image", (2, 8, 8, 4)), "caption": ["one", "two"]}
    losses = [m.train().shared_step(batch, SampleRandom(1, 0, 0, 2, "cpu"))[0] for m in (model, plain)]
    assert torch.equal(*losses)


def test_both_see_the_noise_that_the_yaml_asks_for(teacher_file: Path) -> None:
    model, seen = student(teacher_file, noise_config=NOISES), []
    for network in (model.model, model.teacher.network):
        network.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    batch = {"image": data("image", (3, 8, 8, 4)), "caption": ["one", "two", "three"]}
    loss, _ = model.shared_step(batch, SampleRandom(1, 0, 0, 3, "cpu"))
    again, _ = model.shared_step(batch, SampleRandom(1, 0, 0, 3, "cpu"))
    assert torch.equal(seen[0], seen[1]) and torch.equal(loss, again)
    plain = student(teacher_file)
    assert not torch.equal(plain.shared_step(batch, SampleRandom(1, 0, 0, 3, "cpu"))[0], loss)


@pytest.mark.parametrize("precision, close", [(16, 1e-2), ("bf16", 5e-2)])
def test_a_teacher_of_half_precision(precision: int | str, close: float, teacher_file: Path) -> None:
    arguments = data("x", (2, 4, 8, 8)), data("c", (2, 5, 24)), TIMESTEPS, data("noise", (2, 4, 8, 8))
    whole, half = (
        student(teacher_file, teacher_config={"ckpt_path": str(teacher_file), "precision": p}) for p in (32, precision)
    )
    assert next(half.teacher.network.parameters()).dtype != torch.float32
    expected = whole.p_losses(*arguments)[1]
    for key, value in half.p_losses(*arguments)[1].items():
        assert relative_error(value, expected[key]) < close


def test_averaged_weights_are_the_teacher(teacher_file: Path, tmp_path: Path) -> None:
    plain = diffusion(LatentDiffusion, LITTLE, use_ema=True)
    key, shadow = "output_blocks.2.0.in_layers.2.weight", "diffusion_modeloutput_blocks20in_layers2weight"
    getattr(plain.model_ema, shadow).fill_(0.5)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "teacher.ckpt")
    model = student(tmp_path / "teacher.ckpt")
    for network, place in ((model.teacher.network, key), (model.model, key.replace("2", "0", 1))):
        assert (network.diffusion_model.get_parameter(place) == 0.5).all()


def test_a_student_goes_on_from_a_student(teacher_file: Path, tmp_path: Path) -> None:
    first = student(teacher_file)
    with torch.no_grad():
        first.model.diffusion_model.out[2].bias.fill_(7)
    write_tensors(first.state_dict(), tmp_path / "student.safetensors", "safetensors")
    second = diffusion(unet=CUT, teacher_config={"ckpt_path": str(teacher_file)})
    second.start_from(str(tmp_path / "student.safetensors"))
    second.setup_teacher()
    assert (second.model.diffusion_model.out[2].bias == 7).all()
    assert relative_error(second.teacher.network.diffusion_model.out[2].bias, torch.full((4,), 7.0)) > 0.1


def test_pictures_show_the_teacher_beside(teacher_file: Path) -> None:
    model = student(teacher_file, use_ema=True).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = {"image": data("image", (2, 8, 8, 4)), "caption": ["one", "two"]}
    logs = model.log_images(batch, N=2, ddim_steps=2, unconditional_guidance_scale=2.0)
    pairs = {name: logs[f"teacher_{name}"] for name in logs if name.startswith("samples")}
    assert len(pairs) == 2 and all(relative_error(logs[name], theirs) > 1e-3 for name, theirs in pairs.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output_weight": -1}, "output_weight is -1"),
        ({"feature_weight": "much"}, "feature_weight is 'much'"),
        ({"teacher_config": {"precision": 8}}, "precision"),
        ({"teacher_config": {"precision": [16]}}, "precision"),
        ({"teacher_config": {"path": "x"}}, "may hold ckpt_path"),
        ({"teacher_config": "teacher.ckpt"}, "may hold ckpt_path"),
        ({"teacher_config": {"ckpt_path": "no.ckpt"}}, "no checkpoint 'no.ckpt'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusion(**settings)


def test_a_teacher_that_is_missing_or_another_is_named(teacher_file: Path, tmp_path: Path) -> None:
    model = diffusion(unet=CUT)
    with pytest.raises(UserError, match="teacher_config.ckpt_path"):
        model.setup_teacher()
    with pytest.raises(UserError, match="no checkpoint 'gone.ckpt'; say with --actual_resume"):
        model.start_from("gone.ckpt")
    wide = diffusion(unet=CUT | {"num_res_blocks": 3})
    with pytest.raises(UserError, match="cannot be cut out"):
        wide.start_from(str(teacher_file))
    for resolutions, message in (([2], "unexpected: diffusion_model.input_blocks"), ([4, 2, 1], "missing")):
        other = diffusion(unet=CUT | {"attention_resolutions": resolutions})
        path = (
            write_teacher(tmp_path, LITTLE | {"attention_resolutions": [2]}) if message == "missing" else teacher_file
        )
        with pytest.raises(UserError, match=f"is not of unet_config.*{message}"):
            other.load_teacher(path)
    write_tensors({"x": torch.ones(1)}, tmp_path / "x.safetensors", "safetensors")
    with pytest.raises(UserError, match="no U-Net"):
        model.load_teacher(tmp_path / "x.safetensors")
