"""The tiny world's own feature net, which stands where Inception stands for photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ldm.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, WORLD, Scene, random_scene, render_array

WEIGHTS = Path(__file__).resolve().parents[2] / "models" / "tiny" / "features.safetensors"
ANSWERS = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES), "background": tuple(BACKGROUNDS)}
CHANNELS = (24, 48, 96, 128)
NOISE = 0.3  # standard deviation of the strongest noise that training lays over pictures in [-1, 1]


class SceneFeatures(nn.Module):
    """A small classifier of the tiny world's scenes: pictures [B, 3, 64, 64] in [-1, 1] -> features [B, 128].

    It is trained to name shape, colour, size and background, and to tell how much noise lies over a picture, so that
    its features feel both what a picture shows and how clean it is.
    """

    size, dimensions = WORLD, CHANNELS[-1]

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(CHANNELS[-1], len(words)) for name, words in ANSWERS.items()})
        self.noise = nn.Linear(CHANNELS[-1], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).mean(dim=(2, 3))

    def loss(self, images: torch.Tensor, answers: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the answers [B, 4], and squared error of the noise's level [B] in [0, 1]."""
        features = self(images)
        named = [
            nn.functional.cross_entropy(head(features), answers[:, i]) for i, head in enumerate(self.heads.values())
        ]
        return sum(named) + nn.functional.mse_loss(self.noise(features)[:, 0], level)

    def answer(self, images: torch.Tensor) -> list[dict[str, str]]:
        """What the net reads in pictures [B, 3, 64, 64]."""
        features = self(images)
        picked = {name: head(features).argmax(1).tolist() for name, head in self.heads.items()}
        return [{name: ANSWERS[name][picked[name][i]] for name in ANSWERS} for i in range(len(images))]


def draw_scenes(count: int, seed: int) -> tuple[torch.Tensor, list[Scene]]:
    """`count` random scenes of all shape-colour pairs: pictures [count, 3, 64, 64] in [-1, 1], and what they show."""
    rng = np.random.default_rng([seed, 64])
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = np.stack([render_array(scene) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, scenes


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> SceneFeatures:
    """A net trained on random scenes, half of them under noise."""
    from tqdm import trange

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = SceneFeatures()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    with trange(steps, desc="Training", unit="step") as bar:
        for step in bar:
            images, scenes = draw_scenes(batch_size, seed + 1 + step)
            answers = torch.tensor([[ANSWERS[name].index(getattr(s, name)) for name in ANSWERS] for s in scenes])
            level = (2 * torch.rand(batch_size, generator=generator) - 1).clamp(min=0)
            images = images + NOISE * level.view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator)
            loss = net.loss(images, answers, level)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    return net.eval()


def load(path: str | Path = WEIGHTS) -> SceneFeatures:
    """The trained net that comes with the repository, or another one's weights.

    Raises:
        UserError: they are missing, or of something else.
    """
    from ldm.checkpoint import apply_state_dict, read_state_dict

    net = SceneFeatures()
    apply_state_dict(net, read_state_dict(path), str(path))
    return net.float().eval().requires_grad_(False)
