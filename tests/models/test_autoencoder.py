"""The KL autoencoder: its outputs, names and training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.util import UserError
from tests.goldens.fill import data, fill
from tests.networks import GOLDENS, relative_error

SMALL: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
SD_V1: dict[str, Any] = SMALL | {
    "resolution": 256,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
}
TINY: dict[str, Any] = SMALL | {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_groups": 4,
    "resolution": 16,
    "attn_resolutions": [],
}


def loss(**params: Any) -> dict[str, Any]:
    """A lossconfig, without LPIPS."""
    params = {"disc_start": 0, "disc_num_layers": 2, "perceptual_weight": 0.0, "kl_weight": 1e-6} | params
    return {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}


def pictures(count: int = 4, size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Smooth pictures [size, size, 3] in [-1, 1], channels last, as data sets give them."""
    ramp = torch.linspace(-1, 1, size)
    phases = torch.linspace(0, 2, count)
    return [{"image": torch.stack([torch.sin(3 * ramp + p) * ramp[:, None]] * 3, dim=-1)} for p in phases]


def fit(model: AutoencoderKL, steps: int = 3, **settings: Any) -> pl.Trainer:
    """Train on the CPU for some steps, two an epoch, and validate after each epoch."""
    settings = {"max_steps": steps, "limit_val_batches": 1} | settings
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader(pictures(), batch_size=2), DataLoader(pictures(2), batch_size=2))
    return trainer


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}


# ---- what it computes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "modules.npz") as file:
        return {key: file[key] for key in file.files if key.startswith("kl_")}


@torch.no_grad()
def test_encoder_and_decoder_agree_with_the_original(golden: dict[str, np.ndarray]) -> None:
    model = fill(AutoencoderKL(SMALL, embed_dim=4)).eval()
    posterior = model.encode(data("klx", (2, 3, 32, 32)))
    assert relative_error(posterior.parameters, golden["kl_moments"]) < 1e-4
    assert relative_error(posterior.std, golden["kl_std"]) < 1e-4
    assert relative_error(model.decode(data("klz", (2, 4, 8, 8))), golden["kl_dec"]) < 1e-4


@pytest.mark.parametrize(("name", "ddconfig"), [("kl", SMALL), ("sd_v1_vae", SD_V1)])
def test_state_dict_has_the_original_keys(name: str, ddconfig: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoencoderKL(ddconfig, embed_dim=4)
    reference = json.loads((GOLDENS / "keys.json").read_text())[name]
    prefix = "first_stage_model." if next(iter(reference)).startswith("first_stage_model.") else ""
    assert shapes(model.state_dict()) == {key.removeprefix(prefix): value for key, value in reference.items()}


def diffusers_name(key: str, levels: int) -> str:
    """The name that diffusers' AutoencoderKL gives one of our weights."""
    parts = key.split(".")
    if parts[1] in ("down", "up"):
        level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
        kind = ["resnets", parts.pop(4)] if parts[3] == "block" else [f"{parts[3]}rs", "0"]
        parts[1:4] = [f"{parts[1]}_blocks", str(level), *kind]
    elif parts[1] == "mid":
        middle = {"block_1": ["resnets", "0"], "attn_1": ["attentions", "0"], "block_2": ["resnets", "1"]}
        parts[1:3] = ["mid_block", *middle[parts[2]]]
    renamed = {
        "norm_out": "conv_norm_out",
        "nin_shortcut": "conv_shortcut",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
        "norm": "group_norm",
    }
    return ".".join(renamed.get(part, part) for part in parts)


@pytest.mark.parametrize(("ch", "ch_mult", "blocks", "size"), [(32, [1, 2], 1, 24), (64, [1, 1, 2, 3], 2, 40)])
@torch.no_grad()
def test_agrees_with_diffusers(ch: int, ch_mult: list[int], blocks: int, size: int) -> None:
    from diffusers import AutoencoderKL as Peer

    ddconfig = SMALL | {"ch": ch, "ch_mult": ch_mult, "num_res_blocks": blocks, "attn_resolutions": []}
    ours = fill(AutoencoderKL(ddconfig | {"z_channels": 6}, embed_dim=6)).eval()
    levels = len(ch_mult)
    peer = Peer(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[ch * multiple for multiple in ch_mult],
        layers_per_block=blocks,
        latent_channels=6,
    ).eval()
    wanted = peer.state_dict()
    state = {diffusers_name(key, levels): value for key, value in ours.state_dict().items()}
    peer.load_state_dict({key: value.reshape(wanted[key].shape) for key, value in state.items()})
    x = data("peerx", (2, 3, size, size))
    parameters = ours.encode(x).parameters
    assert relative_error(parameters, peer.encode(x).latent_dist.parameters) < 1e-4
    z = parameters.chunk(2, dim=1)[0]
    assert relative_error(ours.decode(z), peer.decode(z).sample) < 1e-4


def test_attention_of_xformers_is_torchs() -> None:
    attending = TINY | {"attn_resolutions": [16]}
    plain, other = (AutoencoderKL(attending | {"attn_type": kind}, 4) for kind in ("vanilla", "vanilla-xformers"))
    other.load_state_dict(fill(plain).state_dict())
    x = data("attention", (1, 3, 16, 16))
    assert torch.equal(plain.eval().encode(x).parameters, other.eval().encode(x).parameters)


def test_wrong_settings_are_named() -> None:
    for wrong, name in (
        ({"chanels": 3}, "chanels"),
        ({"attn_type": "linear"}, "attn_type"),
        ({"num_groups": 5}, "num_groups"),
        ({"double_z": False}, "double_z"),
    ):
        with pytest.raises(UserError, match=name):
            AutoencoderKL(SMALL | wrong, embed_dim=4)


def test_identity_first_stage_changes_nothing() -> None:
    x = data("identity", (1, 3, 4, 4))
    stage = IdentityFirstStage()
    assert stage.encode(x) is x and stage.decode(x) is x and stage.quantize(x) is x and stage(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


# ---- training ----------------------------------------------------------------------------------------------


def test_training_without_discriminator_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(TINY, 4, loss(disc_factor=0.0), learning_rate=1e-3)
    assert model.automatic_optimization and shapes(model.loss.state_dict()) == {"logvar": []}
    first = fit(model, steps=2).callback_metrics["val/rec_loss"]
    last = fit(model, steps=30).callback_metrics["val/rec_loss"]
    assert last < 0.8 * first
    assert model.loss.logvar == 0.0


def test_training_with_discriminator_moves_both_and_counts_steps_once() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(TINY, 4, loss(disc_start=2), learning_rate=1e-3)
    judge = [p.clone() for p in model.loss.discriminator.parameters()]
    decoder = model.get_last_layer().clone()
    trainer = fit(model, steps=2)
    assert trainer.global_step == 2 and not torch.equal(decoder, model.get_last_layer())
    unmoved = zip(judge, model.loss.discriminator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in unmoved), "before disc_start the discriminator rests"
    trainer = fit(model, steps=4)
    assert trainer.global_step == 4
    moved = [not torch.equal(a, b) for a, b in zip(judge, model.loss.discriminator.parameters(), strict=True)]
    assert all(moved)
    metrics = trainer.callback_metrics
    assert {"train/d_weight", "train/g_loss", "train/disc_loss", "val/disc_loss", "val/rec_loss"} <= set(metrics)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_adversarial_training_accumulates_clips_and_follows_its_schedule() -> None:
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [10],
            "cycle_lengths": [1000],
            "f_start": [0.0],
            "f_max": [1.0],
            "f_min": [1.0],
        },
    }
    model = AutoencoderKL(TINY, 4, loss(), scheduler_config=schedule, learning_rate=1e-3)
    trainer = fit(model, steps=-1, max_epochs=3, accumulate_grad_batches=2, gradient_clip_val=1.0)  # of two batches
    assert model.accumulate_grad_batches == 2 and model.gradient_clip_val == 1.0
    assert trainer.global_step == 3
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([3e-4, 3e-4])


def test_the_decoder_alone_can_be_trained_on() -> None:
    model = AutoencoderKL(TINY, 4, loss(), learning_rate=1e-3, decoder_only=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, steps=3)
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "post_quant_conv", "loss"}


def test_a_step_does_not_depend_on_the_global_random_state() -> None:
    def trained(noise: int) -> torch.Tensor:
        model = fill(AutoencoderKL(TINY, 4, loss(disc_factor=0.0), learning_rate=1e-3))
        torch.manual_seed(noise)
        fit(model, steps=2)
        return model.get_last_layer().detach()

    assert torch.equal(trained(1), trained(2))


def test_averaged_weights_lag_behind_and_are_swapped_in_for_pictures() -> None:
    model = AutoencoderKL(TINY, 4, loss(disc_factor=0.0), learning_rate=1e-2, use_ema=True, ema_decay=0.9)
    before = model.get_last_layer().clone()
    fit(model, steps=2)
    trained = model.get_last_layer().clone()
    with model.ema_scope():
        averaged = model.get_last_layer().clone()
    assert torch.equal(trained, model.get_last_layer())
    assert not torch.equal(averaged, trained) and not torch.equal(averaged, before)
    assert "model_ema.decoderconv_outweight" in model.state_dict()
    assert not any(key.startswith("model_ema.loss") for key in model.state_dict())


def test_logged_pictures() -> None:
    model = AutoencoderKL(TINY, 4)
    batch = {"image": torch.stack([item["image"] for item in pictures(3)])}
    logs = model.log_images(batch, N=2)
    assert {name: tuple(images.shape) for name, images in logs.items()} == dict.fromkeys(
        ("inputs", "reconstructions", "samples"), (2, 3, 32, 32)
    )
    assert list(model.log_images(batch, only_inputs=True)) == ["inputs"]
    many = AutoencoderKL(TINY | {"in_channels": 5, "out_ch": 5}, 4, colorize_nlabels=5)
    logs = many.log_images({"image": torch.rand(2, 16, 16, 5)})
    assert all(images.shape == (2, 3, 16, 16) and images.abs().max() <= 1.0 for images in logs.values())


def test_no_loss_cannot_be_trained() -> None:
    with pytest.raises(UserError, match="lossconfig"):
        fit(AutoencoderKL(TINY, 4, {"target": "torch.nn.Identity"}))


def test_weights_to_begin_with_are_read(tmp_path: Any) -> None:
    source = fill(AutoencoderKL(TINY, 4))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "begin.ckpt")
    model = AutoencoderKL(TINY, 4, ckpt_path=str(tmp_path / "begin.ckpt"), ignore_keys=["quant_conv"])
    assert torch.equal(model.get_last_layer(), source.get_last_layer())
    assert not torch.equal(model.quant_conv.weight, source.quant_conv.weight)
