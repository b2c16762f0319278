"""The yaml of configs/autoencoder: what they say they are, and their training as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import main
from ldm.checkpoint import empty_weights
from ldm.util import instantiate_from_config, load_yaml
from tests.zoo import ZOO, noise, shrink

# yaml: (pixels a latent, channels of the latents, entries of the codebook)
LATENTS = {
    "autoencoder_kl_64x64x3": (4, 3, None),
    "autoencoder_kl_32x32x4": (8, 4, None),
    "autoencoder_kl_16x16x16": (16, 16, None),
    "autoencoder_kl_8x8x64": (32, 64, None),
    "vq-f4": (4, 3, 8192),
    "vq-f4-noattn": (4, 3, 8192),
    "vq-f8": (8, 4, 16384),
    "vq-f8-n256": (8, 4, 256),
    "vq-f16": (16, 8, 16384),
}
SMALL = [
    "model.params.ddconfig.ch=32", "model.params.ddconfig.num_res_blocks=1", "model.params.ddconfig.ch_mult=[1,1]",
    "model.params.lossconfig.params.disc_start=2", "data.params.batch_size=2", "data.params.num_workers=0",
    "data.params.train.params.size=32", "data.params.validation.params.size=32",
    "data.params.train.params.repeats=8", "lightning.callbacks.image_logger.params.batch_frequency=1000",
    "lightning.trainer.accelerator=cpu",
]  # fmt: skip


def test_no_yaml_is_forgotten() -> None:
    assert {path.stem for path in (ZOO / "autoencoder").glob("*.yaml")} == set(LATENTS)


@pytest.mark.parametrize("name", LATENTS)
def test_latents_are_as_the_yaml_says(name: str) -> None:
    factor, channels, entries = LATENTS[name]
    config = load_yaml(ZOO / "autoencoder" / f"{name}.yaml")
    config.model.params.lossconfig = None
    with empty_weights():
        whole = instantiate_from_config(config.model)
    shape = None if entries is None else tuple(whole.quantize.embedding.weight.shape)
    assert shape == (None if entries is None else (entries, channels))
    shrink(config.model)
    model = instantiate_from_config(config.model).eval()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        encoded = model.encode(x)
        latents = encoded[0] if entries else encoded.mode()
        assert latents.shape == (1, channels, 64 // factor, 64 // factor)
        assert model.decode(latents).shape == x.shape


@pytest.mark.parametrize("name", ["autoencoder_kl_32x32x4", "vq-f8"])
def test_it_trains_as_the_original_does(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reconstruction and discriminator, batches accumulated by the trainer; without LPIPS' weights, which is said."""
    for i in range(2):
        noise("RGB", 32, 32, seed=i).save(tmp_path / f"{i}.png")
    words = [
        "--base",
        str(ZOO / "autoencoder" / f"{name}.yaml"),
        *SMALL,
        "-t",
        "--max_steps",
        "4",
        "-l",
        str(tmp_path / "logs"),
    ]
    words += [f"data.params.{part}.params.data_root={tmp_path}" for part in ("train", "validation")]
    if name.startswith("vq"):  # as the original's yaml names it
        words.append("model.params.lossconfig.target=taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator")
    main.main(words)
    said = capsys.readouterr().out
    assert "perceptual term (LPIPS) is off" in said and "Finished at step 4" in said
    accumulated = 2 if name.startswith("autoencoder") else 1
    assert f"= {accumulated} (accumulated batches)" in said
    (last,) = tmp_path.glob("logs/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=False)["batches_seen"] == 4 * accumulated
