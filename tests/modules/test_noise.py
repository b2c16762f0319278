import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import norm

from ldm.modules import noise as noises
from ldm.modules.noise import GaussianNoise, ImmiscibleNoise
from ldm.modules.randomness import GlobalRandom, SampleRandom
from ldm.util import UserError, instantiate_from_config

SHAPE = (4, 4, 4)
WAIT_SECONDS = 240


def images(batch: int, seed: int = 0) -> torch.Tensor:
    """Unlike each other in norm and mean, as pictures are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *SHAPE, generator=generator)
    return x * torch.rand(batch, 1, 1, 1, generator=generator) + 0.3 * torch.randn(batch, 1, 1, 1, generator=generator)


def by_scipy(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    cost = cdist(x.flatten(1).double().numpy(), noise.flatten(1).double().numpy())
    return noise[linear_sum_assignment(cost)[1]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_assignment_is_scipys_and_a_permutation(seed, batch):
    x = images(batch, seed)
    drawn = SampleRandom(seed, 0, 0, batch, "cpu").randn_like(x)
    dealt = ImmiscibleNoise()(x, SampleRandom(seed, 0, 0, batch, "cpu"))
    assert torch.equal(dealt, by_scipy(x, drawn))
    rows = lambda n: sorted(map(tuple, n.flatten(1).tolist()))  # noqa: E731
    assert rows(dealt) == rows(drawn)


def test_assignment_brings_noise_nearer():
    x = images(64)
    plain = GaussianNoise()(x, SampleRandom(0, 0, 0, 64, "cpu"))
    dealt = ImmiscibleNoise()(x, SampleRandom(0, 0, 0, 64, "cpu"))
    assert (x - dealt).flatten(1).norm(dim=1).sum() < 0.99 * (x - plain).flatten(1).norm(dim=1).sum()


def test_distances_are_exact_far_from_the_origin():
    x, y = images(9) + 100, images(7, 1) + 100
    expected = cdist(x.flatten(1).double().numpy(), y.flatten(1).double().numpy())
    assert np.allclose(noises.distances(x, y).numpy(), expected, rtol=1e-9)


def a_process(rank: int, trials: list[dict], folder: str) -> None:
    """One process of several: writes the noise that it gets in each trial, or the error."""
    torch.set_num_threads(1)
    world, results = len(trials[0]["sizes"]), []
    store = torch.distributed.FileStore(f"{folder}/meet", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for trial in trials:
        sizes = trial["sizes"]
        first, size = sum(sizes[:rank]), sizes[rank]
        x = images(sum(sizes))[first : first + size, :, :, : trial.get("widths", [4] * world)[rank]].clone()
        x[:, 0, 0, 0] += trial.get("added", [0.0] * world)[rank]
        try:
            results.append(ImmiscibleNoise()(x, SampleRandom(5, 3, first, size, "cpu")))
        except UserError as error:
            results.append(str(error))
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def in_processes(trials: list[dict]) -> list[list]:
    """For each trial what each process got."""
    world = len(trials[0]["sizes"])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(a_process, (trials, folder), world, join=False)
        deadline = time.monotonic() + WAIT_SECONDS
        try:
            while not context.join(1):
                assert time.monotonic() < deadline, "the processes wait for each other"
        finally:
            for process in context.processes:
                process.kill()
        return list(zip(*(torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)), strict=True))


def alone() -> torch.Tensor:
    noise = ImmiscibleNoise()(images(24), SampleRandom(5, 3, 0, 24, "cpu"))
    assert torch.equal(noise, by_scipy(images(24), SampleRandom(5, 3, 0, 24, "cpu").randn_like(images(24))))
    return noise


def test_two_processes_get_what_one_gets_and_fail_together():
    equal, unlike, shapes, broken = in_processes([
        {"sizes": [12, 12]},
        {"sizes": [10, 14]},
        {"sizes": [12, 12], "widths": [4, 3]},
        {"sizes": [12, 12], "added": [0.0, float("inf")]},
    ])  # fmt: skip
    assert torch.equal(torch.cat(equal), alone()) and torch.equal(torch.cat(unlike), alone())
    assert all("samples of 4x4x3 and 4x4x4" in error and "\n" not in error for error in shapes)
    assert all("NaN or infinity" in error for error in broken)


def test_four_processes_get_what_one_gets():
    assert torch.equal(torch.cat(in_processes([{"sizes": [6, 6, 6, 6]}])[0]), alone())


# ---- KNN ------------------------------------------------------------------------------------------------------


def every_draw(x: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    return SampleRandom(seed, 0, 0, len(x), "cpu").randn_like(x.unsqueeze(1).expand(-1, k, *SHAPE))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 20))
def test_knn_picks_the_nearest_draw(seed, batch, k):
    x, draws = images(batch, seed), every_draw(images(batch, seed), k, seed)
    picked = ImmiscibleNoise("knn", k)(x, SampleRandom(seed, 0, 0, batch, "cpu"))
    distance = (draws - x.unsqueeze(1)).double().flatten(2).norm(dim=2)
    assert torch.equal(picked, draws[range(batch), distance.argmin(1)])


@pytest.mark.parametrize("held", [1, 7, 64 * 20, 64 * 60])
def test_knn_in_blocks_picks_the_same(held, monkeypatch):
    # One sample is 64 numbers; the draws of one generator are the same in pieces of any number of 16s.
    monkeypatch.setattr(noises, "BLOCK", held)
    x = images(5)
    picked = ImmiscibleNoise("knn", 20)(x, SampleRandom(0, 0, 0, 5, "cpu"))
    distance = (every_draw(x, 20, 0) - x.unsqueeze(1)).double().flatten(2).norm(dim=2)
    assert torch.equal(picked, every_draw(x, 20, 0)[range(5), distance.argmin(1)])


def test_knn_holds_few_draws_at_a_time(monkeypatch):
    held = []
    randn_like = SampleRandom.randn_like
    monkeypatch.setattr(SampleRandom, "randn_like", lambda self, x: held.append(x.numel()) or randn_like(self, x))
    monkeypatch.setattr(noises, "BLOCK", 1000)
    ImmiscibleNoise("knn", 50)(images(6), SampleRandom(0, 0, 0, 6, "cpu"))
    assert max(held) <= 1000 and sum(held) == 6 * 50 * 64


@pytest.mark.parametrize("k, variance", [(1, 1.0), (4, 1.0), (16, 1.0), (16, 0.25)])
def test_knn_bends_the_noise_as_theory_says(k, variance):
    batch, size = 1500, 1024
    x = torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * math.sqrt(variance)
    torch.manual_seed(1)
    noise = ImmiscibleNoise("knn", k)(x, GlobalRandom(batch, "cpu"))
    largest = quad(lambda z: z * k * norm.pdf(z) * norm.cdf(z) ** (k - 1), -9, 9)[0]
    shift = 2 * largest / math.sqrt((2 + 4 * variance) * size)
    error = 1 / math.sqrt(batch * size)
    assert abs(float(noise.mean())) < 4 * error
    slope = float((noise * x).mean()) / variance
    assert slope == pytest.approx(shift, abs=0.05 * shift + 4 * error / math.sqrt(variance))
    assert float(noise.square().mean()) == pytest.approx(1 - shift, abs=0.05 * shift + 6 * error)


def test_knn_has_the_published_sizes_bias():
    x = torch.randn(300, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    noise = ImmiscibleNoise("knn", 64)(x, GlobalRandom(300, "cpu"))  # 64 draws of 4096 numbers
    assert float(noise.var()) == pytest.approx(0.969, abs=0.004)
    assert float(torch.corrcoef(torch.stack([noise.flatten(), x.flatten()]))[0, 1]) == pytest.approx(0.029, abs=0.004)


# ---- options, errors, models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GaussianNoise, ImmiscibleNoise])
def test_offset_is_added_to_whole_channels(kind):
    x = images(8)
    plain, offset = (kind(offset_strength=s)(x, SampleRandom(0, 0, 0, 8, "cpu")) for s in (0.0, 0.5))
    assert torch.allclose((offset - plain).std(dim=(2, 3)), torch.zeros(8, 4), atol=1e-6)
    assert 0.3 < float((offset - plain).std()) < 0.7


@pytest.mark.parametrize(
    "params, named",
    [
        ({"method": "nearest"}, "'nearest'; it may be assignment or knn"),
        ({"method": "knn", "k": 0}, "k is 0"),
        ({"method": "knn", "k": 2.5}, "k is 2.5"),
        ({"offset_strength": -1}, "offset_strength is -1"),
        ({"input_perturbation": "much"}, "input_perturbation is 'much'"),
    ],
)
def test_wrong_settings_are_named_in_one_line(params, named):
    with pytest.raises(UserError) as error:
        instantiate_from_config({"target": "ldm.modules.noise.ImmiscibleNoise", "params": params})
    assert named in str(error.value) and "\n" not in str(error.value)


def test_images_that_are_no_numbers_are_an_error():
    x = images(4)
    x[2, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="hold NaN or infinity"):
        ImmiscibleNoise()(x, GlobalRandom(4, "cpu"))


def tiny_ddpm(**noise):
    from ldm.models.diffusion.base import DDPM

    torch.manual_seed(0)
    unet = dict(image_size=4, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[],
                num_res_blocks=1, channel_mult=[1], num_heads=1)  # fmt: skip
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    config = {"target": "ldm.modules.noise.ImmiscibleNoise", "params": noise}
    return DDPM({"target": target, "params": unet}, channels=4, image_size=4, noise_config=config, use_ema=False)


def test_the_network_sees_perturbed_noise_and_aims_at_the_plain(monkeypatch):
    model = tiny_ddpm(input_perturbation=0.1)
    x, seen = images(16), []
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond=None: seen.append(x) or torch.zeros_like(x))
    noise, random = model.draw_noise(x, SampleRandom(0, 0, 0, 16, "cpu")), SampleRandom(1, 0, 0, 16, "cpu")
    t = torch.full((16,), 999)
    loss, _ = model.p_losses(x, None, t, noise=noise, random=random)
    assert float(loss) == pytest.approx(float(noise.square().mean()), rel=1e-5)
    added = seen[0] - model.q_sample(x, t, noise)
    assert float(added.std()) == pytest.approx(0.1 * float(model.sqrt_one_minus_alphas_cumprod[999]), rel=0.1)
    model.eval()
    model.p_losses(x, None, t, noise=noise, random=random)
    assert torch.equal(seen[1], model.q_sample(x, t, noise))


@pytest.mark.parametrize("method", noises.METHODS)
def test_training_learns_and_reports_the_share_of_the_noise(method):
    model = tiny_ddpm(method=method, k=4)
    logged = []
    model.log_dict = lambda logs, **how: logged.append(logs)
    batch = {"image": images(8).permute(0, 2, 3, 1)}
    for _ in range(3):
        model.training_step(batch, 0).backward()
    assert "noise_share" not in logged[0]
    assert all(0 < logs["noise_share"] < 1 for logs in logged[1:])
    model.on_validation_start()
    model.training_step(batch, 0)
    assert "noise_share" not in logged[-1]
    assert all(p.grad is not None for p in model.model.parameters())
