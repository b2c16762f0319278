"""Guidance by a small random CLIP: its gradient, what it does to samples, and a CLIP that cannot be had."""

import pytest
import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.k_diffusion.clip_guidance import ClipGuidance, ClipModel, Cutouts, check, spherical_distance
from ldm.k_diffusion.pixels import PixelSampler
from ldm.models.diffusion.trainer import noises
from tests.small_clip import write_clip

CPU = torch.device("cpu")
TEXT = "a photo of a red dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture(scope="module")
def clip(folder):
    return ClipModel.load(str(folder), None, CPU)


def gaussian(x, sigma):
    """The exact denoiser of N(0, 0.5^2)."""
    return x * (0.25 / (0.25 + sigma**2))[:, None, None, None]


def guidance(clip, scale, count=2, **settings):
    return ClipGuidance(gaussian, clip, TEXT, scale, noises(7, count), **settings)


def test_the_distance_is_half_the_squared_angle():
    angle = torch.tensor([0.1, 1.0, 3.0])
    a, b = torch.tensor([[1.0, 0.0]] * 3), torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(spherical_distance(a, b), angle**2 / 2, rtol=1e-3, atol=0)


def test_texts_and_images_become_what_open_clip_makes_of_them(clip):
    import open_clip

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    normalised = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        found = F.normalize(clip.model.encode_image(normalised), dim=1)
        text = F.normalize(clip.model.encode_text(open_clip.SimpleTokenizer(context_length=12)([TEXT])), dim=1)
    torch.testing.assert_close(clip.of_images(images), found)
    torch.testing.assert_close(clip.similarity(images, TEXT), found @ text[0])
    grey = images[:, :1]
    torch.testing.assert_close(clip.of_images(grey), clip.of_images(grey.repeat(1, 3, 1, 1)))


def test_guidance_adds_sigma_squared_times_the_gradient(clip):
    torch.manual_seed(0)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0])
    led = guidance(clip, 3.0, cutouts=Cutouts(1), limit=None)
    plain = gaussian(x, sigma)
    pushed = (led(x, sigma) - plain) / sigma[:, None, None, None] ** 2
    direction, step = F.normalize(pushed.flatten(1), dim=1).view_as(x), 0.02
    with torch.no_grad():
        ahead, behind = (led.distances(gaussian(x + way * step * direction, sigma)) for way in (1, -1))
    slope = -3.0 * (ahead - behind) / (2 * step)
    torch.testing.assert_close((pushed * direction).flatten(1).sum(1), slope, rtol=0.03, atol=0)
    torch.testing.assert_close(guidance(clip, 0.0)(x, sigma), plain.clamp(-1, 1))


@pytest.mark.parametrize("sampler", ["dpmpp_2s_ancestral", "heun"])
def test_led_samples_are_nearer_to_the_text(clip, sampler):
    how = PixelSampler(steps=8, sampler=sampler)
    similarity = {}
    for scale in (0.0, 300.0):
        led = guidance(clip, scale, count=6, cutouts=Cutouts(4))
        images = how.draw(led, (3, 16, 16), noises(0, 6), CPU, 0.05, 20.0)
        assert images.isfinite().all() and images.abs().max() <= 1.0
        similarity[scale] = clip.similarity(images, TEXT)
    assert (similarity[300.0] > similarity[0.0] + 0.1).all()


def test_a_picture_does_not_depend_on_its_batch(clip):
    x, sigma = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, 1.0])
    together = guidance(clip, 20.0)(x, sigma)
    alone = ClipGuidance(gaussian, clip, TEXT, 20.0, noises(8, 1))(x[1:], sigma[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_cutouts_are_the_whole_and_squares_within_it():
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    image = torch.stack([rows, columns])
    generator = torch.Generator().manual_seed(0)
    sides = set()
    for _ in range(50):
        part = Cutouts().square(image, generator)
        assert part.shape[1] == part.shape[2] and 6 <= part.shape[1] <= 12
        top, left, side = int(part[0, 0, 0]), int(part[1, 0, 0]), part.shape[1]
        assert torch.equal(part, image[:, top : top + side, left : left + side])
        sides.add(side)
    assert sides >= {6, 9, 12}
    views = Cutouts(3)(image[None].repeat(2, 1, 1, 1), noises(0, 2), (12, 20))
    assert views.shape == (6, 2, 12, 20)
    torch.testing.assert_close(views[0], image)
    torch.testing.assert_close(views[3], image)


def test_a_clip_that_cannot_be_had_is_told_before_it_is_built(tmp_path, folder):
    for name, weights, message in (
        ("ViT-B-999", None, "open_clip has no model 'ViT-B-999'"),
        ("ViT-B-32", None, "--clip_weights: needs a file with ViT-B-32's weights, or a tag .*: openai"),
        ("ViT-B-32", "none.pt", "there is no file 'none.pt', and of ViT-B-32 open_clip's tags are openai"),
        ("no/folder", None, "there is no folder 'no/folder'; on the hub it is hf-hub:"),
        (str(tmp_path), None, "has no open_clip_config.json"),
        (str(folder), "some.pt", "has its own weights; leave the flag out"),
    ):
        with pytest.raises(UserError, match=message):
            check(name, weights)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(UserError, match="--clip_weights: '.*empty' cannot be read"):
        ClipModel.load(str(empty), None, CPU)
    (empty / "open_clip_model.safetensors").write_text("no weights")
    with pytest.raises(UserError, match="--clip_weights: '.*empty' cannot be read"):
        ClipModel.load(str(empty), None, CPU)
