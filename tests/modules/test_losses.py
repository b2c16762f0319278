"""The autoencoder's loss against taming-transformers' parts and the formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import taming.modules.losses.lpips as peer_lpips
import torch
import torchvision
from taming.modules.losses import vqperceptual as peer
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.contperceptual import hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.util import UserError
from tests.goldens.fill import data, fill


@pytest.fixture(scope="module")
def lpips_of_taming() -> nn.Module:
    """The peer's LPIPS with filled weights in place of its downloads."""
    with torch.device("meta"):
        vgg = nn.Module()
        vgg.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_lpips.models, "vgg16", lambda pretrained: vgg)
        patch.setattr(peer_lpips.LPIPS, "load_from_pretrained", lambda self: None)
        model = peer_lpips.LPIPS()
    model.net.to_empty(device="cpu")
    model = fill(model).eval()
    model.scaling_layer.load_state_dict(peer_lpips.ScalingLayer().state_dict())
    return model


@pytest.fixture(scope="module")
def lpips_file(lpips_of_taming: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights as an autoencoder's checkpoint holds them."""
    path = tmp_path_factory.mktemp("lpips") / "kl.ckpt"
    state = lpips_of_taming.state_dict()
    torch.save({f"loss.perceptual_loss.{key}": value for key, value in state.items()}, path)
    return path


def posterior() -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(data("moments", (2, 8, 4, 4)))


def images(name: str) -> torch.Tensor:
    return data(name, (2, 3, 32, 32), 0.5).clamp(-1, 1)


def autoencoder_loss(**params: Any) -> LPIPSWithDiscriminator:
    return LPIPSWithDiscriminator(**{"disc_start": 0, "disc_factor": 0.0, "perceptual_weight": 0.0} | params)


def test_lpips_agrees_with_taming(lpips_of_taming: nn.Module, lpips_file: Path) -> None:
    ours = LPIPS.from_files(lpips_file)
    assert set(ours.state_dict()) == set(lpips_of_taming.state_dict())
    a, b = images("a"), images("b").requires_grad_()
    torch.testing.assert_close(ours(a, b), lpips_of_taming(a, b))
    assert ours(a, a).abs().max() == 0.0
    gradients = [torch.autograd.grad(model(a, b).sum(), b)[0] for model in (ours, lpips_of_taming)]
    torch.testing.assert_close(*gradients)
    assert not ours.train().training and not any(p.requires_grad for p in ours.parameters())


def test_lpips_takes_the_two_published_files_and_names_what_they_lack(
    lpips_of_taming: nn.Module, tmp_path: Path
) -> None:
    vgg, linear = tmp_path / "vgg16.pth", tmp_path / "vgg.pth"
    convolutions = {
        f"features.{key.split('.', 2)[2]}": value
        for key, value in lpips_of_taming.state_dict().items()
        if key.startswith("net.")
    }
    torch.save(convolutions | {"classifier.0.bias": torch.zeros(3)}, vgg)
    torch.save({k: v for k, v in lpips_of_taming.state_dict().items() if k.startswith("lin")}, linear)
    ours = LPIPS.from_files([vgg, linear])
    torch.testing.assert_close(ours(images("a"), images("b")), lpips_of_taming(images("a"), images("b")))
    with pytest.raises(UserError, match=r"vgg16\.pth.*lin0\.model\.1\.weight"):
        LPIPS.from_files(vgg)


def test_what_has_no_weight_is_not_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(autoencoder_loss().state_dict()) == ["logvar"]
    assert capsys.readouterr().out == ""
    assert list(autoencoder_loss(perceptual_weight=1.0).state_dict()) == ["logvar"]
    assert "perceptual term (LPIPS) is off" in capsys.readouterr().out
    with pytest.raises(UserError, match="wasserstein"):
        autoencoder_loss(disc_loss="wasserstein")


def test_state_dict_has_the_original_keys(lpips_of_taming: nn.Module, lpips_file: Path) -> None:
    ours = autoencoder_loss(disc_factor=1.0, perceptual_weight=1.0, lpips_ckpt=str(lpips_file))
    reference = {"logvar"} | {f"perceptual_loss.{key}" for key in lpips_of_taming.state_dict()}
    reference |= {f"discriminator.{key}" for key in peer.NLayerDiscriminator().state_dict()}
    assert set(ours.state_dict()) == reference
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, _ in ours.named_parameters() if name.startswith("discriminator.")
    }


def test_reconstruction_and_kl_are_sums_over_a_picture() -> None:
    x, reconstruction = images("x"), images("r")
    ours = autoencoder_loss(kl_weight=0.1, logvar_init=0.5)
    loss, logs = ours(x, reconstruction, posterior(), 0, 0)
    likelihood = (x - reconstruction).abs().sum() / 2 / torch.tensor(0.5).exp() + 0.5 * x[0].numel()
    torch.testing.assert_close(loss, likelihood + 0.1 * posterior().kl().mean())
    torch.testing.assert_close(logs["train/rec_loss"], (x - reconstruction).abs().mean())
    assert set(logs) == {f"train/{n}" for n in ("total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss")}
    halved, _ = ours(x, reconstruction, posterior(), 0, 0, weights=0.5)
    torch.testing.assert_close(loss - halved, 0.5 * likelihood)


def test_perceptual_term_is_added_at_every_pixel(lpips_of_taming: nn.Module, lpips_file: Path) -> None:
    x, reconstruction = images("x"), images("r")
    ours = autoencoder_loss(perceptual_weight=2.0, lpips_ckpt=[str(lpips_file)], kl_weight=0.0)
    distance = lpips_of_taming(x, reconstruction)
    expected = ((x - reconstruction).abs() + 2.0 * distance).sum() / 2
    torch.testing.assert_close(ours(x, reconstruction, posterior(), 0, 0)[0], expected)


def test_discriminator_losses_agree_with_taming() -> None:
    real, fake = data("real", (2, 1, 3, 3), 2.0), data("fake", (2, 1, 3, 3), 2.0)
    torch.testing.assert_close(hinge_d_loss(real, fake), peer.hinge_d_loss(real, fake))
    torch.testing.assert_close(vanilla_d_loss(real, fake), peer.vanilla_d_loss(real, fake))


def test_adversarial_term_starts_late_and_balances_the_gradients() -> None:
    torch.manual_seed(0)
    ours = autoencoder_loss(disc_factor=1.0, disc_start=5, disc_weight=0.5, kl_weight=0.0, disc_num_layers=2)
    layer = nn.Conv2d(3, 3, 1)
    x, reconstruction = images("x"), layer(images("r"))
    before, logs = ours(x, reconstruction, posterior(), 0, 4, last_layer=layer.weight)
    assert "train/g_loss" not in logs and ours(x, reconstruction, posterior(), 1, 4)[0] == 0.0
    after, logs = ours(x, reconstruction, posterior(), 0, 5, last_layer=layer.weight)
    torch.testing.assert_close(after - before, logs["train/d_weight"] * logs["train/g_loss"], rtol=1e-3, atol=1e-3)
    parts = [torch.autograd.grad(part, layer.weight, retain_graph=True)[0].norm() for part in (before, after - before)]
    torch.testing.assert_close(parts[1], 0.5 * parts[0], rtol=1e-2, atol=1e-3)
    judged, _ = ours(x, reconstruction, posterior(), 1, 5)
    assert judged > 0.0 and torch.autograd.grad(judged, layer.weight, allow_unused=True)[0] is None
    with torch.no_grad():
        assert ours(x, reconstruction, posterior(), 0, 5)[1]["train/d_weight"] == 0.0


def test_conditional_discriminator_sees_the_condition() -> None:
    ours = autoencoder_loss(disc_factor=1.0, disc_conditional=True, disc_in_channels=4, disc_num_layers=2).eval()
    a, b = (data(name, (2, 1, 32, 32)) for name in ("conda", "condb"))
    losses = [ours(images("x"), images("r"), posterior(), 1, 0, cond=cond)[0] for cond in (a, b)]
    assert losses[0] != losses[1]
