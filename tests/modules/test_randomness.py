import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.modules.noise import GaussianNoise
from ldm.modules.randomness import GlobalRandom, SampleRandom, drop_captions


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 7))
def test_a_sample_draws_the_same_in_any_batch(seed, step, split):
    whole = SampleRandom(seed, step, 0, 8, "cpu")
    parts = [SampleRandom(seed, step, 0, split, "cpu"), SampleRandom(seed, step, split, 8 - split, "cpu")]
    x = torch.empty(8, 2, 3, 3)
    halves = [part.randn_like(x[: len(part.generators)]) for part in parts]
    assert torch.equal(whole.randn_like(x), torch.cat(halves))
    assert torch.equal(whole.randint(1000), torch.cat([part.randint(1000) for part in parts]))


def test_steps_and_seeds_differ():
    x = torch.empty(2, 4)
    draws = [SampleRandom(s, t, 0, 2, "cpu").randn_like(x) for s in (0, 1) for t in (0, 1)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 4


def test_noise_is_standard_normal_and_offset_moves_whole_channels():
    x = torch.empty(64, 4, 16, 16)
    noise = GaussianNoise()(x, SampleRandom(0, 0, 0, 64, "cpu"))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    offset = GaussianNoise(offset_strength=1.0)(x, SampleRandom(0, 0, 0, 64, "cpu"))
    assert torch.allclose((offset - noise).std(dim=(2, 3)), torch.zeros(64, 4), atol=1e-5)
    assert abs((offset - noise).std() - 1) < 0.15


def test_captions_are_dropped_at_the_given_rate():
    dropped = drop_captions(["a"] * 2000, GlobalRandom(2000, "cpu"), 0.1)
    assert 140 < dropped.count("") < 260
