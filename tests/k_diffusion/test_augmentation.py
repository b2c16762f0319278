"""Augmentation: what is done to an image is what the network is told, and without it there is nothing to tell."""

import math

import numpy as np
import pytest
import torch
from skimage import transform

from ldm.errors import UserError
from ldm.k_diffusion.augmentation import Augmentation, AugmentWrapper, warp
from ldm.modules.randomness import SampleRandom


def randomness(batch, step=0):
    return SampleRandom(3, step, 0, batch, "cpu")


def smooth_images(batch, size=32):
    """Images of a few waves, which interpolation hardly changes."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(2 * np.pi * (x + i * y / 3)) * np.cos(2 * np.pi * y * (i % 2)) for i in range(batch)]
    return torch.from_numpy(np.stack(waves)).float()[:, None]


def matrix_of(told, size, sign, scale=2**0.2, stretch=2**0.2, shift=1 / 8):
    """The transformation that nine numbers describe, by Karras et al. (2022, table 6), from scikit-image's parts.

    They leave open whether an image was made longer or shorter along the axis, which `sign` says.
    """
    mirrored, upside_down, a2, cos_1, sin, b_cos, b_sin, a6, a7 = (float(value) for value in told)
    affine = transform.AffineTransform
    turn, axis, amount = math.atan2(sin, cos_1 + 1), math.atan2(b_sin, b_cos), sign * math.hypot(b_cos, b_sin)
    parts = [
        affine(scale=(1 - 2 * mirrored, 1 - 2 * upside_down)),
        affine(scale=(scale**a2, scale**a2)),
        affine(rotation=-turn),
        affine(rotation=axis), affine(scale=(stretch**amount, stretch**-amount)), affine(rotation=-axis),
        affine(translation=(shift * size * a6, shift * size * a7)),
    ]  # fmt: skip
    whole = np.eye(3)
    for part in parts:
        whole = whole @ part.params
    return whole


def test_the_nine_numbers_describe_what_was_done():
    images = torch.zeros(64, 1, 16, 16)
    matrices, told = Augmentation(probability=0.5).draw(images, randomness(64))
    for matrix, numbers in zip(matrices, told, strict=True):
        assert any(np.allclose(matrix.numpy(), matrix_of(numbers, 16, sign), atol=2e-5) for sign in (1, -1))


def test_images_are_warped_as_scikit_image_does():
    images = smooth_images(6)
    matrices, _ = Augmentation(probability=1.0).draw(images, randomness(6))
    found = warp(images, matrices)
    middle = np.array([[1, 0, 15.5], [0, 1, 15.5], [0, 0, 1]])
    for image, matrix, result in zip(images, matrices, found, strict=True):
        pixels = middle @ matrix.double().numpy() @ np.linalg.inv(middle)
        back = transform.AffineTransform(pixels).inverse
        expected = transform.warp(image[0].numpy(), back, order=3, mode="symmetric")
        assert np.abs(result[0].numpy() - expected)[4:-4, 4:-4].max() < 0.06


def test_mirrored_images_are_mirrored_exactly():
    images = torch.randn(32, 3, 8, 8)
    found, told = Augmentation(probability=1e-9)(images, randomness(32))
    expected = torch.where(told[:, 0].bool().view(-1, 1, 1, 1), images.flip(3), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 8 < int(told[:, 0].sum()) < 24 and not told[:, 1:].any()


def test_a_sample_is_augmented_alike_in_any_batch():
    images = smooth_images(6)
    augment = Augmentation(probability=0.5)
    whole, told = augment(images, randomness(6))
    part, told_part = augment(images[4:], randomness(6).part(slice(4, 6)))
    torch.testing.assert_close(part, whole[4:])
    torch.testing.assert_close(told_part, told[4:])


def test_operations_are_as_frequent_as_said():
    images = torch.zeros(4000, 1, 8, 8)
    _, told = Augmentation(probability=0.12).draw(images, randomness(4000))
    shares = [(told[:, columns] != 0).any(dim=1).float().mean().item() for columns in ([0], [1], [2], [4], [5, 6], [7])]
    for share, expected in zip(shares, (0.5, 0.06, 0.12, 0.12, 0.12, 0.12), strict=True):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_none_means_that_nothing_is_done_and_said():
    images = torch.randn(4, 1, 8, 8)
    found, told = Augmentation(probability=0)(images, randomness(4))
    assert found is images and told.shape == (4, 9) and not told.any()


def test_the_network_is_told_zeros_where_nothing_is_said():
    class Network(torch.nn.Module):
        def forward(self, x, sigma, mapping_cond):
            return mapping_cond

    wrapper, x, sigma = AugmentWrapper(Network()), torch.zeros(2, 1, 4, 4), torch.ones(2)
    assert torch.equal(wrapper(x, sigma), torch.zeros(2, 9))
    both = wrapper(x, sigma, aug_cond=torch.ones(2, 9), mapping_cond=torch.full((2, 3), 5.0))
    assert torch.equal(both, torch.cat([torch.ones(2, 9), torch.full((2, 3), 5.0)], dim=1))


def test_a_wrong_probability_is_said():
    with pytest.raises(UserError, match="augment_prob is 2"):
        Augmentation(2)
