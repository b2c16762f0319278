"""k-diffusion's samplers behind the samplers' interface: calls, previews, known regions, batches, image to image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.karras import KarrasSampler
from ldm.samplers import SAMPLERS, SCHEDULES, steps_within
from tests.models.toys import QUIET, X_T, C, Model, run, toy

NAMES = [name for name, choice in SAMPLERS.items() if choice.name == "KarrasSampler"]
DETERMINISTIC = [name for name in NAMES if not SAMPLERS[name].eta]


def sampler(name: str, model: Model, schedule: str | None = None, **settings: Any) -> KarrasSampler:
    return KarrasSampler(model, schedule, **SAMPLERS[name].settings, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_the_network_are_as_many_as_the_table_says(name: str) -> None:
    calls: list[int] = []
    model = Model(lambda x, t, c: (calls.append(len(x)), toy(x, t, c))[1])
    count = SAMPLERS[name].evaluations
    for steps in (1, 2, 7):
        calls.clear()
        run(lambda m: sampler(name, m), model, steps, scale=3.0)
        assert set(calls) == {4}  # both halves of guidance at once
        assert count is None or len(calls) == count(steps)
    for allowed in (1, 4, 8, 9):
        steps = steps_within(name, allowed)
        assert (steps is None) == (count is None)
        assert count is None or count(steps) <= allowed < count(steps + 1)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_all_lead_to_where_ddim_leads_with_many_steps(name: str) -> None:
    expected = run(DDIMSampler, Model(toy), 1000)
    made = run(lambda m: sampler(name, m), Model(toy), 100)
    assert (made - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_schedules_lead_there_too(schedule: str) -> None:
    expected = run(lambda m: sampler("dpmpp_2m", m), Model(toy), 60)
    made = run(lambda m: sampler("dpmpp_2m", m, schedule), Model(toy), 60)
    assert (made - expected).abs().mean() < 0.02 * expected.std()
    instance = sampler("dpmpp_2m", Model(toy), schedule)
    instance.make_schedule(12)
    sigmas = instance.sigmas
    assert (sigmas.diff() < 0).all() and len(sigmas) == 13
    assert float(sigmas[0]) == pytest.approx(float(instance.levels.sigma_max), rel=1e-4)
    lowest = float(
        instance.levels.t_to_sigma(torch.tensor(999 / 12)) if schedule == "sgm_uniform" else instance.ends[0]
    )
    assert float(sigmas[-2]) == pytest.approx(lowest, rel=1e-3)


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_predictions_of_every_kind_give_the_same_samples(kind: str) -> None:
    model = Model(toy)
    abar = model.alphas_cumprod

    def formula(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        low = t.floor().long().clamp(max=998)
        logs = ((1 - abar) / abar).log() / 2
        sigma = torch.lerp(logs[low], logs[low + 1], t - low).exp().view(-1, 1, 1, 1)
        alpha = (1 + sigma**2).rsqrt()
        eps = toy(x, t, c)
        x0 = (x - alpha * sigma * eps) / alpha
        return x0 if kind == "x0" else alpha * eps - alpha * sigma * x0

    other = Model(formula)
    other.parameterization = kind
    made, expected = (run(lambda m: sampler("heun", m), m, 10) for m in (other, model))
    torch.testing.assert_close(made, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if not SAMPLERS[name].alone])
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    def draw(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        condition = C[:1].expand(len(seeds), -1, -1)
        return sampler(name, Model(toy)).sample(
            5, len(seeds), (4, 8, 8), condition, generator=generators, **QUIET
        )[0]  # fmt: skip

    together = draw([3, 7, 9])
    torch.testing.assert_close(together[1:2], draw([7]), atol=0, rtol=0)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_known_region_stays(name: str) -> None:
    x0 = torch.full((2, 4, 8, 8), 3.0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    made, _ = sampler(name, Model(lambda x, t, c: torch.zeros_like(x))).sample(
        20, 2, (4, 8, 8), C, x_T=X_T, mask=mask, x0=x0, **QUIET
    )
    assert (made[..., :4] - 3.0).abs().max() < 0.15  # DPM fast and adaptive end at the lowest noise
    assert (made[..., 4:] - 3.0).abs().mean() > 1.0


@pytest.mark.parametrize("name", NAMES)
def test_image_to_image_starts_from_the_image_and_ends_on_time(name: str) -> None:
    instance = sampler(name, Model(toy))
    instance.make_schedule(10)
    x0 = torch.full((2, 4, 8, 8), 3.0)
    first = float(instance.sigmas[6])
    x = instance.stochastic_encode(x0, torch.tensor([4, 4]), noise=X_T)
    torch.testing.assert_close(x * (1 + first**2) ** 0.5, x0 + first * X_T, atol=1e-4, rtol=1e-4)
    seen: list[int] = []
    made = instance.decode(x, C, 4, img_callback=lambda x0, i: seen.append(i), show_progress=False)
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 3 and instance.total == 4
    assert made.isfinite().all()
    whole = instance.stochastic_encode(x0, 10, noise=X_T)
    assert instance.decode(whole, C, 10, show_progress=False).isfinite().all()
    least = instance.decode(instance.stochastic_encode(x0, 1, noise=X_T), C, 1, show_progress=False)
    assert (least - x0).abs().mean() < 1.0


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_fast", "dpm_adaptive", "dpmpp_3m_sde"])
def test_previews_and_intermediates_come_on_the_way(name: str) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    made, intermediates = sampler(name, Model(toy)).sample(
        12, 2, (4, 8, 8), C, x_T=X_T, img_callback=lambda x0, i: seen.append((i, x0)), log_every_t=1, **QUIET
    )
    places = [i for i, _ in seen]
    assert places == sorted(places) and places[0] == 0 and places[-1] == 11
    errors = [(x0 - made).abs().mean() for _, x0 in (seen[0], seen[-1])]
    assert errors[1] < 0.1 * errors[0]
    assert len(intermediates["x_inter"]) == len(seen) + 1
    torch.testing.assert_close(intermediates["x_inter"][1], X_T)  # as the model sees it, not x0 + sigma eps


def test_the_noise_of_steps_is_a_setting_and_has_a_temperature() -> None:
    def draw(temperature: float = 1.0, **settings: float) -> torch.Tensor:
        instance = sampler("euler_ancestral", Model(toy), **settings)
        generator = torch.Generator().manual_seed(1)
        return instance.sample(8, 2, (4, 8, 8), C, x_T=X_T, generator=generator, temperature=temperature, **QUIET)[0]

    torch.testing.assert_close(draw(eta=0.0), run(lambda m: sampler("euler", m), Model(toy), 8))
    torch.testing.assert_close(draw(temperature=0.5), draw(s_noise=0.5))
    assert not torch.equal(draw(), draw(eta=0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KarrasSampler(Model(toy), sampler="eular"), "sampler: 'eular' is none of euler"),
        (lambda: KarrasSampler(Model(toy), "linear"), "schedule: 'linear' is none of uniform"),
        (lambda: KarrasSampler(Model(toy), sampler="lms", eta=1.0), "eta: the sampler lms has no such setting"),
        (lambda: KarrasSampler(Model(toy), "vp", rho=3.0), "rho: only the schedules karras and polyexponential"),
        (lambda: run(KarrasSampler, Model(toy), 0), "sampling steps: 0 is not within 1 .. 1000"),
        (lambda: run(KarrasSampler, Model(toy), 1001), "sampling steps: 1001"),
        (lambda: run(KarrasSampler, Model(toy), 5, eta=0.5), "ddim_eta 0.5: is DDIM's"),
    ],
)
def test_what_cannot_be_is_said(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
