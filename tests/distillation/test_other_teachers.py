"""A teacher of another kind, a transformer that was trained by flow matching, goes through the trainer as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.distillation.denoisers import Schedule
from ldm.distillation.flash import FlashDiffusion
from ldm.distillation.path import TeacherPath
from ldm.modules import lora
from ldm.modules.randomness import Randomness, SampleRandom
from tests.distillation.flash_models import BATCH, PHASE, Words, fill_lora
from tests.goldens.fill import data, fill

TIMES = torch.arange(1, 1001, dtype=torch.float64) / 1000  # x = (1 - s) x_0 + s noise: the last is noise alone


class Tokens(nn.Module):
    """A transformer block over pixels and words, which tells the velocity noise - x_0."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 32), nn.Linear(32, 4)
        self.to_q, self.to_k, self.to_v = nn.Linear(32, 32), nn.Linear(24, 32), nn.Linear(24, 32)

    def features(self, x: torch.Tensor, s: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        time = s.to(x).view(-1, 1, 1, 1).expand_as(x[:, :1])
        tokens = self.enter(torch.cat([x, time], 1).flatten(2).transpose(1, 2)).tanh()
        weights = (self.to_q(tokens) @ self.to_k(c).transpose(1, 2) / 32**0.5).softmax(-1)
        return (tokens + weights @ self.to_v(c)).transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x: torch.Tensor, s: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.leave(self.features(x, s, c).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Flow(nn.Module):
    """The teacher: the network and its text encoder, on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.text = Tokens(), Words()


class FlowDenoiser:
    """What the trainer sees of it."""

    image_key, feature_channels = "image", 32

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.schedule = model, Schedule(1 - TIMES, TIMES)

    @property
    def network(self) -> nn.Module:
        return self.model.transformer

    def twin(self) -> FlowDenoiser:
        model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        return FlowDenoiser(model, None)

    def inputs(self, batch: dict, random: Randomness) -> tuple[torch.Tensor, Any, Any]:
        z = batch["image"].permute(0, 3, 1, 2)
        return z, self.model.text(batch["caption"]), self.model.text([""] * len(z))

    def x0(self, x: torch.Tensor, t: torch.Tensor, c: Any, empty: Any = None, scale: float = 1.0) -> torch.Tensor:
        velocity = self.network(x, TIMES[t], c)
        if empty is not None:
            velocity = torch.lerp(self.network(x, TIMES[t], empty), velocity, scale)
        return x - self.schedule.levels(t, x)[1] * velocity

    def features(self, x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        return self.network.features(x, TIMES[t], c)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z

    def words(self, batch: dict, prompts: list[str] | None = None) -> list[str]:
        return prompts or batch["caption"]

    def draw(
        self, words: list[str], batch: dict, steps: int, scale: float | None = None, seed: int = 0
    ) -> torch.Tensor:
        x, c = data(f"draw {seed}", (len(words), 3, 8, 8)), self.model.text(words)
        return x * steps + c.mean() + sum(p.sum() for p in self.network.parameters())

    def write_lora(self, path: Path) -> None:
        save_file(lora.weights_of(self.network), path)


@pytest.fixture
def model() -> FlashDiffusion:
    config = {"target": f"{__name__}.Flow", "params": {}}
    model = FlashDiffusion(
        teacher_config=config, phases=[PHASE], teacher_steps=5, guidance=[2.0, 4.0], use_ema=True,
        lora_config={"rank": 2, "targets": ["to_q", "to_k", "to_v"]}, denoiser=f"{__name__}.FlowDenoiser",
    )  # fmt: skip
    fill(model.teacher)
    model.teacher_loaded = True
    model.make_student()
    fill_lora(model)
    return model


@pytest.mark.parametrize("start", [0, 30])
def test_the_way_of_a_flow_begins_at_noise_alone(start: int) -> None:
    """Of Gaussian data with mean m and deviation d the flow is known: a m + sqrt(a^2 d^2 + s^2) e ends at m + d e."""
    mean, deviation, schedule = 0.7, 0.4, Schedule(1 - TIMES, TIMES)
    path = TeacherPath(schedule, 100)

    def expected_x0(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = schedule.levels(t, x)
        return mean + a * deviation**2 / (a**2 * deviation**2 + s**2) * (x - a * mean)

    a, s = schedule.level(path.timesteps[start])
    noise = data("noise", (3, 4))
    x = a * mean + (a**2 * deviation**2 + s**2) ** 0.5 * noise
    torch.testing.assert_close(path(expected_x0, x, start), mean + deviation * noise, atol=3e-3, rtol=0)


def test_all_terms_teach_its_student(model: FlashDiffusion) -> None:
    loss, logs = model.shared_step(BATCH, SampleRandom(0, 0, 0, 3, "cpu"))
    loss.backward()
    assert {"train/distillation", "train/matching", "train/adversarial", "train/discriminator"} <= logs.keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all((p.grad is not None and p.grad.abs().sum() > 0) == (n in trained) for n, p in model.named_parameters())
    assert all(".lora_" in name or name.startswith("discriminator.") for name in trained)


def test_its_pictures_and_its_file_are_the_denoisers(model: FlashDiffusion, tmp_path: Path) -> None:
    picture = model.log_images(BATCH, N=2, teacher_steps=3)["teacher_3_student_4_2_1"]
    assert picture.shape == (2, 3, 8, 32)
    model.seen_student.write_lora(tmp_path / "lora.safetensors")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "lora.safetensors")} == {"to_q", "to_k", "to_v"}
