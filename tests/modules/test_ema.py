import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules.ema import InverseWarmUp, LitEma


def test_average_follows_the_formula_and_warms_up():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    ema = LitEma(model, decay=0.9)
    expected = model[0].weight.detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            model[0].weight.add_(0.1 * n)
        ema(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.state_dict()["0weight"], expected)
    assert int(ema.num_updates) == 29


def test_copy_store_and_restore():
    model = nn.Linear(3, 3)
    ema = LitEma(model)
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.weight.mul_(2)
    ema.store(model.parameters())
    ema.copy_to(model)
    assert torch.equal(model.weight, weights[0])
    ema.restore(model.parameters())
    assert torch.equal(model.weight, 2 * weights[0])


def test_frozen_weights_are_not_copied_and_updates_resume():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    ema = LitEma(model, decay=0.5)
    assert set(ema.state_dict()) == {"decay", "num_updates", "weight"}
    for _ in range(5):
        ema(model)
    other = LitEma(model, decay=0.1)
    other.load_state_dict(ema.state_dict())
    with torch.no_grad():
        model.weight.zero_()
    ema(model), other(model)
    assert torch.equal(ema.weight, other.weight)


def test_the_inverse_warm_up_reaches_what_is_said_of_it():
    """k-diffusion's documented decays, and the plain average."""
    for power, steps, decay in ((2 / 3, 31_600, 0.999), (2 / 3, 10**6, 0.9999), (3 / 4, 10_000, 0.999)):
        assert InverseWarmUp(power=power)(steps) == pytest.approx(decay, abs=1e-6)
    assert InverseWarmUp(power=0.75)(215_400) == pytest.approx(0.9999, abs=1e-6)
    bounded = InverseWarmUp(inv_gamma=2.0, min_value=0.1, max_value=0.6, start_at=10)
    assert bounded(5) == bounded(10) == 0.1 and bounded(12) == pytest.approx(0.5) and bounded(1000) == 0.6


def test_an_inverse_warm_up_of_power_one_is_the_mean():
    model, weights = nn.Linear(2, 2, bias=False), []
    ema = LitEma(model, decay=1.0, warm_up=InverseWarmUp())
    for n in range(7):
        with torch.no_grad():
            model.weight.add_(0.3 * n)
        weights.append(model.weight.detach().clone())
        ema(model)
    torch.testing.assert_close(ema.weight, torch.stack(weights).mean(0))


@pytest.mark.parametrize(
    "settings", [dict(power=-1), dict(inv_gamma=0), dict(max_value=2), dict(min_value=1, max_value=0.5)]
)
def test_wrong_warm_ups_are_refused(settings):
    with pytest.raises(UserError, match="ema_config"):
        InverseWarmUp(**settings)
