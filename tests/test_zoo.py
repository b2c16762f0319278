"""Every yaml of the model zoo: as large as published, and, made small, it draws and learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm import loading, unprompted
from ldm.inference import inpaint, txt2img
from ldm.loading import Geometry
from ldm.util import load_yaml
from tests.zoo import WIDTH, ZOO, build, noise, small_config

# yaml: millions of parameters of the U-Net (Rombach et al., 2022, tables 12 to 15; Stable Diffusion's model cards)
# and of the condition's encoder
SIZES = {
    "latent-diffusion/bsr_sr": (113.62, 0),
    "latent-diffusion/celebahq-ldm-vq-4": (274.06, 0),
    "latent-diffusion/cin-ldm-vq-f8": (394.98, 0.51),
    "latent-diffusion/cin256-v2": (400.92, 0.51),
    "latent-diffusion/ffhq-ldm-vq-4": (274.06, 0),
    "latent-diffusion/inpainting_big": (387.25, 53.22),
    "latent-diffusion/layout2img-openimages256": (246.28, 58.86),
    "latent-diffusion/lsun_bedrooms-ldm-vq-4": (274.06, 0),
    "latent-diffusion/lsun_churches-ldm-kl-8": (294.97, 0),
    "latent-diffusion/semantic_synthesis256": (215.23, 0),
    "latent-diffusion/semantic_synthesis512": (215.23, 0),
    "latent-diffusion/text2img256": (403.62, 186.15),
    "latent-diffusion/txt2img-1p4B-eval": (872.30, 581.99),
    "stable-diffusion/v1-inference": (859.52, 123.06),
    "stable-diffusion/v1-inpainting-inference": (859.54, 123.06),
    "stable-diffusion/v2-inference": (865.91, 354.03),
    "stable-diffusion/v2-inference-v": (865.91, 354.03),
    "stable-diffusion/v2-inpainting-inference": (865.93, 354.03),
}
WORDS = "[PAD] [UNK] [CLS] [SEP] a red dog two blue cats".split()


def test_no_yaml_is_forgotten() -> None:
    there = {str(p.relative_to(ZOO).with_suffix("")) for p in ZOO.glob("*-diffusion/*.yaml")}
    assert there == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_it_is_as_large_as_published(name: str) -> None:
    model = loading.build_model(load_yaml(ZOO / f"{name}.yaml"))

    def millions(part: nn.Module | None) -> float:
        return sum(p.numel() for p in part.parameters()) / 1e6 if part is not None else 0.0

    assert (round(millions(model.model), 2), round(millions(model.cond_stage_model), 2)) == SIZES[name]
    assert all(p.is_meta for p in model.parameters())


# ---- small ones --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return path


def draw(model: nn.Module, which: int) -> Image.Image:
    """One picture in two steps, led by the `which`-th of two conditions of the kind that the model takes."""
    geometry = Geometry.of(model)
    quick = {"steps": 2, "progress": False}
    key, encoder = model.cond_stage_key, type(model.cond_stage_model).__name__
    prompt = ["a red dog", "two blue cats"][which]
    if type(model).__name__ == "LatentInpaintDiffusion" or key == "masked_image":
        size = geometry.width, geometry.height
        mask = Image.new("L", size, 255)
        mask.paste(0, (0, 0, size[0] // 2, size[1]))
        return inpaint(model, noise("RGB", *size, seed=which), mask, [prompt], seed=1, **quick)[0].image
    if key in ("caption", "txt"):
        return txt2img(model, [prompt], seed=1, **quick)[0].image
    condition = unprompted.UNLED
    if encoder == "ClassEmbedder":
        condition = unprompted.by_class(model, [which])
    elif key == "LR_image":
        condition = unprompted.by_image(model, noise("RGB", 8, 8, seed=which))
    elif key == "segmentation":
        condition = unprompted.by_image(model, noise("L", geometry.width, geometry.height, seed=which, classes=182))
    elif encoder == "BERTEmbedder":  # a layout
        tokens = torch.randint(64, (1, 92), generator=torch.Generator().manual_seed(which))
        condition = unprompted.Condition(lambda places: (model.get_learned_conditioning(tokens), None))
    return next(unprompted.draw(model, [1], condition, **quick))[0]


@pytest.mark.parametrize("name", SIZES)
def test_made_small_it_draws_what_leads_it(name: str, vocabulary: Path) -> None:
    model = build(small_config(ZOO / f"{name}.yaml", vocabulary)).eval().requires_grad_(False)
    predictions: list[torch.Tensor] = []
    model.model.register_forward_hook(lambda module, inputs, output: predictions.append(output[-1]))
    geometry, last = Geometry.of(model), []
    for which in (0, 1):
        picture = draw(model, which)
        assert picture.size == (geometry.width, geometry.height) and np.asarray(picture).std() > 0
        last.append(predictions[-1])
    assert torch.equal(*last) == (model.model.conditioning_key is None)


def batch_for(model: nn.Module) -> dict[str, Any]:
    """Two random samples as the model's training wants them."""
    geometry = Geometry.of(model)
    size = (2, geometry.height, geometry.width)
    torch.manual_seed(1)
    conditions: dict[str, Callable[[], Any]] = {
        "LR_image": lambda: torch.rand(2, size[1] // geometry.factor, size[2] // geometry.factor, 3),
        "segmentation": lambda: torch.rand(*size, 182),
        "masked_image": lambda: torch.rand(*size, 3),
        "coordinates_bbox": lambda: torch.randint(64, (2, 92)),
        "class_label": lambda: torch.tensor([3, 5]),
    }
    images = {model.first_stage_key: torch.rand(*size, 3) * 2 - 1, "mask": torch.rand(*size).round()}
    images["masked_image"] = torch.rand(*size, 3)
    other = conditions.get(model.cond_stage_key, lambda: ["a red dog", "two blue cats"])
    return images if model.cond_stage_key == model.first_stage_key else images | {model.cond_stage_key: other()}


# The others train alike, but for inpainting_big: its original came without its training, too.
TRAINED = (
    "bsr_sr", "celebahq-ldm-vq-4", "cin-ldm-vq-f8", "layout2img-openimages256", "lsun_churches-ldm-kl-8",
    "semantic_synthesis256", "txt2img-1p4B-eval", "v1-inference", "v1-inpainting-inference", "v2-inference-v",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SIZES if name.endswith(TRAINED)])
def test_made_small_it_learns(name: str, vocabulary: Path) -> None:
    """The loss is a number, and everything that is to be trained gets a gradient."""
    model = build(small_config(ZOO / f"{name}.yaml", vocabulary))
    loss, _ = model.shared_step(batch_for(model))
    loss.backward()
    assert torch.isfinite(loss)
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and "to_logits" not in n]
    assert idle == [] and sum(p.grad is not None for p in model.parameters()) > 50
    trained = model.cond_stage_model is not None and any(p.requires_grad for p in model.cond_stage_model.parameters())
    wanted = model.cond_stage_trainable and any(True for _ in model.cond_stage_model.parameters())
    assert trained == wanted


def test_an_image_leads_through_its_embedding() -> None:
    """Stable Diffusion v1 with CLIP's image encoder in place of the text's; guided, too."""
    config = small_config(ZOO / "stable-diffusion/v1-inference.yaml")
    tower = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    sizes = {"embed_dim": WIDTH, "vision_cfg": tower, "text_cfg": {"width": WIDTH, "heads": 2, "layers": 1}}
    config.model.params.cond_stage_config = {
        "target": "ldm.modules.encoders.modules.FrozenClipImageEmbedder",
        "params": {"architecture": sizes},
    }
    config.model.params.cond_stage_key = config.model.params.first_stage_key
    model = build(config)
    loss, _ = model.shared_step(batch_for(model))
    assert torch.isfinite(loss)
    model.eval().requires_grad_(False)
    assert unprompted.kind_of_condition(model) == "image"

    def draw(seed: int, scale: float) -> np.ndarray:
        condition = unprompted.by_image(model, noise("RGB", 40, 56, seed=seed))
        return np.asarray(next(unprompted.draw(model, [1], condition, steps=2, scale=scale, progress=False))[0])

    assert draw(0, 1.0).shape == (64, 64, 3)
    assert not np.array_equal(draw(0, 1.0), draw(0, 3.0)) and not np.array_equal(draw(0, 3.0), draw(1, 3.0))


def test_the_originals_half_precision_flag_is_taken() -> None:
    """Stable Diffusion v2's own yaml says use_fp16, which goes with CUDA; --precision decides here."""
    config = small_config(ZOO / "stable-diffusion/v2-inference-v.yaml")
    config.model.params.unet_config.params.use_fp16 = True
    model = build(config).eval().requires_grad_(False)
    assert np.asarray(draw(model, 0)).std() > 0
    assert model.model.diffusion_model.dtype == torch.float32
