"""The gradient noise scale against a quadratic's, which is known, and against single samples' gradients."""

import multiprocessing

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks.kill import ranks, wait
from ldm.k_diffusion.gns import DDPGradientStatsHook, GradientNoiseScale
from ldm.k_diffusion.gradient_noise import GradientNoiseLogger
from tests.k_diffusion.quadratic import MEAN, SPREAD, Distances, measure_norms, samples

NOISE_SCALE = float(SPREAD.square().sum() / MEAN.square().sum())


class Quadratic(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.loss = Distances()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)  # stays where its gradients are known


def squares(batch, small):
    """The mean squared norm of gradients of batches of `small` samples, and that of them all."""
    return float(batch.view(-1, small, 3).mean(1).square().sum(1).mean()), float(batch.mean(0).square().sum())


@pytest.mark.parametrize(("small", "large"), [(1, 8), (4, 64)])
def test_the_scale_is_the_quadratics(small, large):
    scale = GradientNoiseScale(beta=0.9995)
    steps = [scale.update(*squares(batch, small), small, large) for batch in samples(4000 * large).split(large)]
    sq_norm, var = np.mean(steps, axis=0)
    assert sq_norm == pytest.approx(float(MEAN.square().sum()), rel=0.05)
    assert var == pytest.approx(float(SPREAD.square().sum()), rel=0.05)
    assert scale.get_gns() == pytest.approx(NOISE_SCALE, rel=0.1)


def test_the_averages_start_without_bias_and_are_saved(tmp_path):
    scale = GradientNoiseScale(beta=0.99)
    assert np.isnan(scale.get_gns())
    first = scale.update(3.0, 1.0, 2, 8)
    assert first == pytest.approx((1 / 3, 16 / 3)) and scale.get_stats() == pytest.approx(first)
    scale.update(5.0, 2.0, 2, 8)
    torch.save(scale.state_dict(), tmp_path / "scale.pt")
    other = GradientNoiseScale()
    other.load_state_dict(torch.load(tmp_path / "scale.pt", weights_only=True))
    assert other.update(4.0, 1.0, 2, 8) == scale.update(4.0, 1.0, 2, 8)
    assert other.get_gns() == scale.get_gns() and other.state_dict() == scale.state_dict()
    with pytest.raises(ValueError, match="batches of 8 and 8"):
        scale.update(1.0, 1.0, 8, 8)


class Batches(pl.LightningDataModule):
    def __init__(self, batch_size, rows):
        super().__init__()
        self.batch_size, self.rows = batch_size, rows

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.rows, self.batch_size)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_logs_the_scale_of_its_samples_gradients(precision):
    small, accumulated, steps = 4, 5, 6
    rows, logger = samples(small * (accumulated * steps + 1)), GradientNoiseLogger(beta=0.9)
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=accumulated, precision=precision, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[logger],
    )  # fmt: skip
    trainer.fit(Quadratic(), Batches(small, rows))
    expected = GradientNoiseScale(beta=0.9)
    for batch in rows[:-small].split(small * accumulated):  # the epoch's rest is no whole step
        expected.update(*squares(batch, small), small, small * accumulated)
    assert trainer.callback_metrics["gradient_noise_scale"] == pytest.approx(expected.get_gns(), rel=1e-4)
    other = GradientNoiseLogger()
    other.load_state_dict(logger.state_dict())
    assert other.scale.get_gns() == pytest.approx(expected.get_gns(), rel=1e-4)


def test_ddp_tells_the_norms_of_its_processes_gradients(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=measure_norms, args=(env, tmp_path / env["RANK"])) for env in ranks(2)]
    for process in started:
        process.start()
    assert wait(started, 120) == [0, 0]
    for step, measured in enumerate(zip(*(torch.load(tmp_path / rank) for rank in "01"), strict=True)):
        both = torch.cat([samples(5, seed=2 * step + rank) for rank in (0, 1)])
        for small, large, gradient in measured:
            assert (small, large) == pytest.approx(squares(both, 5), rel=1e-5)
            torch.testing.assert_close(gradient, -both.mean(0))  # as without the hook


def test_the_hook_wants_a_wrapped_module():
    with pytest.raises(ValueError, match="Linear is not wrapped in DistributedDataParallel"):
        DDPGradientStatsHook(nn.Linear(1, 1))
