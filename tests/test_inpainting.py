"""Inpainting: what stays, to the pixel; what the network sees, against diffusers and the original's formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from ldm.errors import UserError
from ldm.exchange.tokenizer import write_tokenizer
from ldm.inference import Protection, inpaint, load_model, txt2img
from tests.cli.sampling_model import INPAINTING, write_model
from tests.pipelines import SCHEDULE, TEXT, TOKENS, UNET, VAE, libraries, shake

QUICK = {"steps": 3, "progress": False}
# The model of latent diffusion's inpainting, which takes no text: the masked image's latents and the mask beside x.
UNTEXTED = (
    "model.params.unet_config.params.in_channels=9",
    "model.params.unet_config.params.use_spatial_transformer=false",
    "model.params.unet_config.params.context_dim=null",
    "model.params.conditioning_key=concat",
    "model.params.cond_stage_key=masked_image",
    "model.params.cond_stage_config=__is_first_stage__",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """One that was not trained to inpaint."""
    return load_model(*write_model(tmp_path_factory.mktemp("model")), "cpu")


@pytest.fixture(scope="module")
def inpainting_model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_model(*write_model(tmp_path_factory.mktemp("inpainting"), INPAINTING), "cpu")


def photo(width: int, height: int) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((width, height), 60 + 40 * i) for i in range(3)])


def ellipse(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 4, height // 4, width // 2 + 3, height // 2 + 5), fill=255)
    return mask


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("trained", [False, True])
def test_every_pixel_outside_the_mask_stays(
    model: nn.Module, inpainting_model: nn.Module, trained: bool, strength: float, sampler: str
) -> None:
    image, mask = photo(45, 37), ellipse(45, 37)  # no side is a multiple of anything
    chosen = inpainting_model if trained else model
    made = inpaint(chosen, image, mask, ["a", "b"], strength=strength, sampler=sampler, **QUICK)
    hole = np.asarray(mask) == 255
    before = pixels(image)
    for picture in made:
        after = pixels(picture.image)
        np.testing.assert_array_equal(after[~hole], before[~hole])
        assert np.abs(after[hole] - before[hole]).mean() > 5
    assert np.abs(pixels(made[0].image) - pixels(made[1].image)).max() > 1
    alone = inpaint(chosen, image, mask, "b", seed=43, strength=strength, sampler=sampler, **QUICK)
    np.testing.assert_array_equal(pixels(alone[0].image), pixels(made[1].image))
    assert f"Denoising strength: {strength:g}" in made[0].settings.parameters()


def test_the_watermark_stays_inside_the_mask(model: nn.Module) -> None:
    image, mask = photo(264, 256), ellipse(264, 256)
    options = {"steps": 1, "progress": False}
    marked, plain = (
        pixels(inpaint(model, image, mask, "a", protection=Protection(watermark=on), **options)[0].image)
        for on in (True, False)
    )
    hole = np.asarray(mask) == 255
    np.testing.assert_array_equal(marked[~hole], pixels(image)[~hole])
    assert np.abs(marked[hole] - plain[hole]).max() > 0


def test_a_smaller_picture_is_the_resized_one_outside_the_mask(model: nn.Module) -> None:
    image, mask = photo(64, 64), ellipse(64, 64)
    made = inpaint(model, image, mask, "a", height=32, width=40, **QUICK)[0].image
    hole = np.asarray(mask.resize((40, 32), Image.Resampling.NEAREST)) == 255
    expected = pixels(image.resize((40, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(pixels(made)[~hole], expected[~hole])


def test_masks_of_every_kind(model: nn.Module) -> None:
    """White is redrawn, at least half; what is transparent stays."""
    image, hole = photo(32, 32), np.zeros((32, 32), bool)
    hole[8:20, 4:28] = True
    clear = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (4, 8, 28, 20))
    grey = Image.fromarray(np.where(hole, 128, 127).astype(np.uint8))
    one_bit = Image.fromarray(hole)
    turned = one_bit.convert("L").transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back by a quarter
    made = [pixels(inpaint(model, image, mask, "a", **QUICK)[0].image) for mask in (one_bit, clear, grey, turned)]
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])
    np.testing.assert_array_equal(made[0][~hole], pixels(image)[~hole])


@pytest.mark.parametrize(
    "mask, options, message",
    [
        (Image.new("L", (32, 32)), {}, "mask: it is black"),
        (Image.new("L", (32, 24), 255), {}, "32x24 pixels and the image 32x32"),
        (Image.new("L", (32, 32), 255), {"strength": 0.0}, "strength 0"),
        (Image.new("L", (32, 32), 255), {"height": 20}, "must be a multiple of 8; the nearest is"),
    ],
)
def test_what_cannot_be(model: nn.Module, mask: Image.Image, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inpaint(model, photo(32, 32), mask, "a", **QUICK | options)


def inputs_of(model: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
    """What the network saw first: [2, C, h, w], without guidance [1, C, h, w]."""
    seen: list[torch.Tensor] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    inpaint(model, *args, **QUICK | options)
    hook.remove()
    return seen[0]


def test_a_model_without_text_sees_what_the_original_showed_it(tmp_path: Path) -> None:
    model = load_model(*write_model(tmp_path, UNTEXTED), "cpu")
    image, mask = photo(32, 32), ellipse(32, 32)
    x = inputs_of(model, image, mask, "")
    assert x.shape == (1, 9, 8, 8)
    # The original works in [0, 1] and brings the masked image and the mask to [-1, 1] together.
    picture = torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0).permute(2, 0, 1)[None]
    hole = torch.from_numpy((np.asarray(mask) >= 128).astype(np.float32))[None, None]
    with torch.no_grad():
        masked = model.first_stage_model.encode(2.0 * ((1.0 - hole) * picture) - 1.0).mode()
    torch.testing.assert_close(x[:, 4:8], masked, atol=1e-5, rtol=1e-5)
    assert torch.equal(x[:, 8:], 2.0 * nn.functional.interpolate(hole, size=(8, 8)) - 1.0)


def test_an_inpainting_model_draws_whole_pictures_too(inpainting_model: nn.Module) -> None:
    picture = txt2img(inpainting_model, "a cat", **QUICK)[0]
    everything = inpaint(inpainting_model, Image.new("RGB", (32, 32)), Image.new("L", (32, 32), 255), "a cat", **QUICK)
    np.testing.assert_array_equal(pixels(picture.image), pixels(everything[0].image))


def pipeline(folder: Path) -> Any:
    """A random inpainting pipeline of diffusers whose autoencoder's posterior has no spread: no draw differs."""
    diffusers, transformers = libraries()
    write_tokenizer(folder / "tokenizer", TOKENS, "<|endoftext|>")
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionInpaintPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET | {"in_channels": 9}),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | {"hidden_act": "quick_gelu"})),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        shake(module)
    with torch.no_grad():
        pipe.vae.quant_conv.weight[4:] = 0.0
        pipe.vae.quant_conv.bias[4:] = -40.0
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_same_picture_as_diffusers(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "pipeline")
    model = load_model(None, tmp_path / "pipeline", "cpu")
    image, mask = photo(32, 32), ellipse(32, 32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"negative_prompt": "blur", "output_type": "np", "latents": noise, "height": 32, "width": 32}
    with torch.no_grad():
        theirs = pipe("a cat", image, mask, strength=1.0, num_inference_steps=10, guidance_scale=5.0, **options).images
    ours = inpaint(model, image, mask, "a cat", seed=5, steps=10, scale=5.0, negative_prompt="blur", progress=False)
    hole = np.asarray(mask) == 255
    difference = np.abs(pixels(ours[0].image)[hole] - 255.0 * theirs[0][hole])
    assert difference.max() < 1.5  # bytes are cut off here, as in the original, and rounded there
