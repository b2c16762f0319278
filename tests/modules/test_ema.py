import torch
from torch import nn

from ldm.modules.ema import LitEma


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
