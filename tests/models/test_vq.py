"""Autoencoders with a codebook: against diffusers, their names, and their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from taming.modules.losses import vqperceptual as peer_losses
from torch import nn
from torch.utils.data import DataLoader

from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.modules.losses import VQLPIPSWithDiscriminator
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.losses.vqperceptual import measure_perplexity
from ldm.util import UserError
from tests.goldens.fill import data, fill
from tests.models.test_autoencoder import diffusers_name, pictures
from tests.networks import relative_error

SMALL: dict[str, Any] = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TINY: dict[str, Any] = SMALL | {"ch": 8, "num_groups": 4, "resolution": 16}
TAMING = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"


def loss(target: str = "ldm.modules.losses.VQLPIPSWithDiscriminator", **params: Any) -> dict[str, Any]:
    """A lossconfig, without LPIPS."""
    params = {"disc_start": 0, "disc_num_layers": 2, "perceptual_weight": 0.0, "disc_ndf": 8} | params
    return {"target": target, "params": params}


def model(kind: type[VQModel] = VQModel, **params: Any) -> VQModel:
    return kind(**{"ddconfig": SMALL, "lossconfig": None, "n_embed": 16, "embed_dim": 3} | params)


def fit(trained: VQModel, steps: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=steps,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(trained, DataLoader(pictures(), batch_size=2), DataLoader(pictures(2), batch_size=2))
    return trainer


# ---- what it computes --------------------------------------------------------------------------------------


@torch.no_grad()
def test_agrees_with_diffusers() -> None:
    from diffusers import VQModel as Peer

    whole, interface = fill(model()).eval(), fill(model(VQModelInterface)).eval()
    peer = Peer(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        num_vq_embeddings=16,
    ).eval()
    wanted, state = peer.state_dict(), whole.state_dict()
    named = {k if k.startswith("quant") else diffusers_name(k, 2): v for k, v in state.items()}
    peer.load_state_dict({key: value.reshape(wanted[key].shape) for key, value in named.items()})
    x = data("vqx", (2, 3, 32, 32))
    latents = interface.encode(x)
    assert relative_error(latents, peer.encode(x).latents) < 1e-4
    assert relative_error(interface.decode(latents), peer.decode(latents).sample) < 1e-4
    unquantised = peer.decode(latents, force_not_quantize=True).sample
    assert relative_error(interface.decode(latents, force_not_quantize=True), unquantised) < 1e-4
    assert relative_error(unquantised, peer.decode(latents).sample) > 1e-2
    quantised, codebook_loss, (_, _, indices) = whole.encode(x)
    reconstructions, diff, chosen = whole(x, return_pred_indices=True)
    assert torch.equal(reconstructions, whole.decode(quantised)) and torch.equal(diff, codebook_loss)
    torch.testing.assert_close(whole.decode_code(chosen.view(2, 16, 16)), reconstructions)
    assert torch.equal(interface.decode(latents), reconstructions) and torch.equal(indices, chosen)
    assert torch.equal(interface(x)[0], reconstructions)


def test_state_dict_has_the_original_keys() -> None:
    state = {key: list(value.shape) for key, value in model(embed_dim=4).state_dict().items()}
    assert state["quantize.embedding.weight"] == [16, 4]
    assert state["quant_conv.weight"] == [4, 3, 1, 1] and state["post_quant_conv.weight"] == [3, 4, 1, 1]
    assert {key.partition(".")[0] for key in state} == set(VQModel.PARTS)
    assert state == {key: list(v.shape) for key, v in model(VQModelInterface, embed_dim=4).state_dict().items()}


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="double_z"):
        model(ddconfig=SMALL | {"double_z": True})
    with pytest.raises(UserError, match=r"remap.*none\.npy"):
        model(remap=str(tmp_path / "none.npy"))


# ---- the loss ----------------------------------------------------------------------------------------------


def test_loss_agrees_with_taming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_losses, "LPIPS", nn.Identity)  # the peer's would download its weights
    params = {"disc_start": 3, "codebook_weight": 0.5, "disc_weight": 0.75, "perceptual_weight": 0.0, "disc_ndf": 8}
    ours, peer = fill(VQLPIPSWithDiscriminator(**params)), fill(peer_losses.VQLPIPSWithDiscriminator(**params))
    assert set(ours.state_dict()) == set(peer.state_dict())
    layer, codebook_loss = fill(nn.Conv2d(3, 3, 1)), torch.tensor(0.3)
    x, reconstructions = data("vqlx", (2, 3, 32, 32), 0.5), layer(data("vqlr", (2, 3, 32, 32), 0.5))
    for step in (2, 3):
        for index in (0, 1):
            results = [
                module(codebook_loss, x, reconstructions, index, step, last_layer=layer.weight)[0]
                for module in (ours, peer)
            ]
            torch.testing.assert_close(*results)


def test_loss_logs_how_the_codebook_is_used() -> None:
    perplexity, used = measure_perplexity(torch.tensor([[0, 0, 3, 3], [1, 1, 2, 2]]), 10)
    torch.testing.assert_close(perplexity, torch.tensor(4.0))
    assert used == 4
    ours = VQLPIPSWithDiscriminator(0, disc_factor=0.0, perceptual_weight=0.0, n_classes=16, pixel_loss="l2")
    x, reconstructions = data("vqlx", (2, 3, 8, 8)), data("vqlr", (2, 3, 8, 8))
    total, logs = ours(torch.tensor(0.1), x, reconstructions, 0, 0, predicted_indices=torch.arange(4))
    torch.testing.assert_close(total, (x - reconstructions).square().mean() + 0.1)
    assert logs["train/cluster_usage"] == 4
    for wrong in ({"pixel_loss": "l3"}, {"perceptual_loss": "clips"}, {"disc_loss": "wasserstein"}):
        with pytest.raises(UserError, match=next(iter(wrong.values()))):
            VQLPIPSWithDiscriminator(0, **wrong)


# ---- training ----------------------------------------------------------------------------------------------


def test_training_moves_every_part_and_lowers_the_loss() -> None:
    """With the target that the original's yaml names, and no download."""
    torch.manual_seed(0)
    trained = model(ddconfig=TINY, lossconfig=loss(TAMING, disc_start=20, n_classes=16), learning_rate=2e-3)
    assert isinstance(trained.loss, VQLPIPSWithDiscriminator)
    before = {name: value.clone() for name, value in trained.named_parameters()}
    first = fit(trained, steps=2).callback_metrics["val/rec_loss"]
    trainer = fit(trained, steps=24)
    assert trainer.global_step == 24 and trainer.callback_metrics["val/rec_loss"] < 0.9 * first
    moved = {name.split(".")[0] for name, value in trained.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {*VQModel.PARTS, "loss"}
    metrics = trainer.callback_metrics
    assert {"train/d_weight", "train/disc_loss", "train/quant_loss", "train/perplexity"} <= set(metrics)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_the_autoencoder_has_a_learning_rate_of_its_own() -> None:
    trained = model(ddconfig=TINY, lossconfig=loss(), learning_rate=1e-3, lr_g_factor=0.5)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trained.configure_optimizers()]
    assert rates == [5e-4, 1e-3]
    with pytest.raises(UserError, match="lossconfig"):
        model(lossconfig={"target": "ldm.modules.losses.contperceptual.DummyLoss"}).configure_optimizers()
    assert isinstance(DummyLoss(), nn.Identity)


def test_the_codebook_is_averaged_and_the_decoder_can_be_trained_alone() -> None:
    averaged = model(ddconfig=TINY, use_ema=True)
    assert "model_ema.quantizeembeddingweight" in averaged.state_dict()
    alone = model(ddconfig=TINY, decoder_only=True)
    assert {name.split(".")[0] for name, p in alone.named_parameters() if p.requires_grad} == {
        "decoder",
        "post_quant_conv",
    }


def test_batches_are_resized_at_random_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = model(ddconfig=TINY, batch_resize_range=(16, 48))
    batch = {"image": torch.stack([item["image"] for item in pictures(2)])}

    def sizes() -> set[int]:
        out = set()
        for step in range(12):
            resized.batches_seen = step
            out.add(resized.training_input(batch, resized.step_random(2)).shape[-1])
        return out

    assert sizes() == {48}
    monkeypatch.setattr(VQModel, "global_step", 5)
    assert sizes() == {16, 32, 48}


def test_logged_pictures() -> None:
    batch = {"image": torch.stack([item["image"] for item in pictures(3)])}
    logs = model(VQModelInterface, ddconfig=TINY).log_images(batch, N=2)
    assert {name: tuple(images.shape) for name, images in logs.items()} == dict.fromkeys(
        ("inputs", "reconstructions"), (2, 3, 32, 32)
    )
