"""How the zoo's models get their conditions from a batch, in training and for the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.checkpoint import save_checkpoint
from ldm.models.diffusion.ddpm import drop_labels
from ldm.modules.randomness import GlobalRandom
from ldm.util import UserError, instantiate_from_config
from tests.goldens.fill import fill
from tests.zoo import ZOO, build, small_config


def small(name: str, **params: Any) -> nn.Module:
    config = small_config(ZOO / f"{name}.yaml")
    config.model.params.update(params)
    return build(config)


def test_class_labels_are_dropped_for_guidance() -> None:
    rule = {"p": 0.25, "val": 1000}
    model = small("latent-diffusion/cin256-v2", ucg_training={"class_label": rule}).train()
    batch = {"image": torch.rand(8, 32, 32, 3), "class_label": torch.arange(8)}
    seen = [model.get_condition(batch, model.step_random(8))["class_label"] for model.batches_seen in range(40)]
    dropped = torch.stack(seen) == 1000
    assert 0.15 < dropped.float().mean() < 0.35 and dropped.any(0).all()
    assert torch.equal(torch.stack(seen)[~dropped] % 8, torch.arange(8).repeat(40, 1)[~dropped])
    assert torch.equal(batch["class_label"], torch.arange(8))
    assert model.eval().get_condition(batch, model.step_random(8)) is batch
    with pytest.raises(UserError, match="ucg_training.*val"):
        drop_labels(torch.arange(8), GlobalRandom(8, "cpu"), {"p": 0.1})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("latent-diffusion/cin256-v2", "class_label", torch.tensor([3, 5, 7])),
        ("latent-diffusion/bsr_sr", "LR_image", torch.rand(3, 8, 8, 3)),
        ("latent-diffusion/semantic_synthesis256", "segmentation", torch.rand(3, 32, 32, 182)),
        ("stable-diffusion/v1-inpainting-inference", "txt", ["a dog", "a cat", ""]),
    ],
)
def test_logged_pictures(name: str, key: str, value: Any) -> None:
    model = small(name).eval()
    size = 8 * 2 ** (len(model.first_stage_model.encoder.down) - 1)
    images = {k: torch.rand(3, size, size, 3) for k in (model.first_stage_key, "masked_image")}
    batch = images | {"mask": torch.rand(3, size, size).round(), key: value}
    logs = model.log_images(batch, N=2, ddim_steps=2)
    assert {"inputs", "reconstruction", "samples"} <= set(logs)
    assert all(torch.isfinite(picture).all() and len(picture) == 2 for picture in logs.values())
    assert ("samples_cfg_scale_3.00" in logs) == (key == "txt")


def test_inpainting_says_what_its_batch_lacks() -> None:
    model = small("stable-diffusion/v1-inpainting-inference")
    with pytest.raises(UserError, match="concat_keys has 'masked_image'"):
        model.shared_step({"jpg": torch.rand(1, 64, 64, 3), "mask": torch.ones(1, 64, 64), "txt": ["a dog"]})
    with pytest.raises(UserError, match="conditioning_key"):
        small("stable-diffusion/v1-inpainting-inference", conditioning_key="crossattn")


@torch.no_grad()
def test_inpainting_goes_on_from_a_model_that_does_not_inpaint(tmp_path: Path) -> None:
    usual = small("stable-diffusion/v1-inference", use_ema=True)
    fill(usual.model_ema)
    save_checkpoint(usual.state_dict(), tmp_path / "model.ckpt")
    config = small_config(ZOO / "stable-diffusion/v1-inpainting-inference.yaml")
    config.model.params.update(ckpt_path=str(tmp_path / "model.ckpt"), use_ema=True)
    inpainting = instantiate_from_config(config.model)
    x, beside, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.tensor([3, 17])
    text = usual.get_learned_conditioning(["a dog", "a cat"])
    condition = {"c_concat": [beside], "c_crossattn": [text]}
    torch.testing.assert_close(inpainting.apply_model(x, t, condition), usual.apply_model(x, t, text))
    with inpainting.ema_scope(), usual.ema_scope():
        torch.testing.assert_close(inpainting.apply_model(x, t, condition), usual.apply_model(x, t, text))
    config.model.params.finetune_keys = None
    with pytest.raises(UserError, match="misshapen.*input_blocks"):
        instantiate_from_config(config.model)
