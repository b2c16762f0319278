"""LPIPS: how different two pictures look, from the features of VGG-16 (Zhang et al., 2018)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError

# Numbers of the convolutions in torchvision's VGG-16, and their channels; LPIPS looks where a slice ends.
SLICES = (
    {0: (3, 64), 2: (64, 64)},
    {5: (64, 128), 7: (128, 128)},
    {10: (128, 256), 12: (256, 256), 14: (256, 256)},
    {17: (256, 512), 19: (512, 512), 21: (512, 512)},
    {24: (512, 512), 26: (512, 512), 28: (512, 512)},
)


class Slice(nn.Sequential):
    """Convolutions with ReLU, under torchvision's numbers."""

    def __init__(self, convolutions: Mapping[int, tuple[int, int]]) -> None:
        super().__init__()
        for number, (channels_in, channels_out) in convolutions.items():
            self.add_module(str(number), nn.Conv2d(channels_in, channels_out, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution in self:
            x = F.relu(convolution(x))
        return x


class Weighting(nn.Module):
    """A weight a channel: [B, C, H, W] -> [B, 1, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Scaling(nn.Module):
    """From [-1, 1] to the range that VGG-16 was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale


class LPIPS(nn.Module):
    """Distance [B, 1, 1, 1] of two batches of pictures [B, 3, H, W] in [-1, 1] (Zhang et al., 2018, eq. 1).

    State-dict keys are those of `loss.perceptual_loss` in CompVis' autoencoder checkpoints. Never trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = Scaling()
        self.net = nn.Module()
        for i, convolutions in enumerate(SLICES):
            setattr(self.net, f"slice{i + 1}", Slice(convolutions))
            setattr(self, f"lin{i}", Weighting(list(convolutions.values())[-1][1]))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode: dropout would change the distance."""
        return super().train(False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The five feature maps, each of unit length along its channels."""
        x, maps = self.scaling_layer(x), []
        for i in range(len(SLICES)):
            x = getattr(self.net, f"slice{i + 1}")(F.max_pool2d(x, 2) if i else x)
            maps.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, inputs: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and inputs.requires_grad):
            targets = self.features(inputs)
        distance = torch.zeros((), device=inputs.device)
        for i, (a, b) in enumerate(zip(targets, self.features(reconstructions), strict=True)):
            distance = distance + getattr(self, f"lin{i}")((a - b) ** 2).mean(dim=(2, 3), keepdim=True)
        return distance

    @classmethod
    def from_files(cls, paths: str | os.PathLike[str] | Sequence[str]) -> LPIPS:
        """LPIPS with the weights of one file or several together.

        Takes an autoencoder's checkpoint that holds `loss.perceptual_loss.*`, or the two published files:
        torchvision's VGG-16 (`features.0.weight` ...) and LPIPS' own (`lin0.model.1.weight` ...).

        Raises:
            UserError: a file cannot be read, or together they lack weights.
        """
        from ldm.checkpoint import read_state_dict

        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        state = {}
        for path in paths:
            state |= {_own_key(key): value for key, value in read_state_dict(path).items()}
        model = cls()
        wanted = {key: value.shape for key, value in model.state_dict().items()}
        constants = model.scaling_layer.state_dict(prefix="scaling_layer.")
        state = constants | {key: value for key, value in state.items() if key in wanted}
        lacking = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
        if lacking:
            names = " and ".join(map(str, paths))
            raise UserError(
                f"lpips_ckpt: {names}: no fitting '{lacking[0]}' ({len(lacking)} of {len(wanted)} lack); "
                "give VGG-16's and LPIPS' files as a list, or a checkpoint with loss.perceptual_loss.*"
            )
        model.load_state_dict(state)
        return model


def _own_key(key: str) -> str:
    """The name here of a weight in an autoencoder's checkpoint or in torchvision's VGG-16."""
    key = key.removeprefix("first_stage_model.").removeprefix("loss.").removeprefix("perceptual_loss.")
    family, _, rest = key.partition(".")
    number = rest.partition(".")[0]
    if family == "features" and number.isdigit():
        for i, convolutions in enumerate(SLICES):
            if int(number) in convolutions:
                return f"net.slice{i + 1}.{rest}"
    return key
