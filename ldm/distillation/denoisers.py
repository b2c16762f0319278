"""What Flash Diffusion sees of teacher and student: denoisers with a schedule and a condition, and no more.

A model of another kind (another U-Net, a transformer, flow matching) is distilled by a class with `LatentDenoiser`'s
methods, which the yaml names (`denoiser:`); the trainer stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.exchange import lora as files
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.sampling import Denoiser
from ldm.models.diffusion.trainer import noises
from ldm.modules import lora
from ldm.modules.randomness import Randomness
from ldm.signals import abandon_pictures


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x_0 + sigma_t noise at the trained timesteps; alphas and sigmas are [N]."""

    alphas: torch.Tensor
    sigmas: torch.Tensor

    def __len__(self) -> int:
        return len(self.alphas)

    def level(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) of one timestep."""
        return float(self.alphas[t]), float(self.sigmas[t])

    def levels(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) of timesteps t [B], of a shape to be multiplied with `like` [B, ...]."""
        shape = (-1, *([1] * (like.ndim - 1)))
        return tuple(value.to(like)[t].view(shape) for value in (self.alphas, self.sigmas))

    def noised(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_start [B, ...] at timesteps t [B]."""
        alpha, sigma = self.levels(t, x_start)
        return alpha * x_start + sigma * noise


class _Reached(Exception):
    """The features are there: the rest of the network need not run."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features


class LatentDenoiser:
    """A `LatentDiffusion` with a U-Net, of Stable Diffusion's kind.

    Args:
        model: ldm.models.diffusion.ddpm.LatentDiffusion, or another with its interface. config: its yaml.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self.model, self.config = model, config
        abar = model.alphas_cumprod.double()
        self.schedule = Schedule(abar.sqrt(), (1 - abar).sqrt())

    @property
    def network(self) -> nn.Module:
        """What of the model is trained in the student."""
        return self.model.model.diffusion_model

    @property
    def image_key(self) -> str:
        """The entry of a batch that holds the pictures."""
        return self.model.first_stage_key

    def twin(self) -> LatentDenoiser:
        """A second one on the same weights, in whose network other modules can be put; encoders are the very same."""
        model = self.model
        shared = [*model.parameters(), *model.buffers(), model.first_stage_model, model.cond_stage_model]
        return type(self)(copy.deepcopy(model, {id(part): part for part in shared}), self.config)

    def inputs(self, batch: dict, random: Randomness) -> tuple[torch.Tensor, Any, Any]:
        """Latents [B, C, h, w], their condition, and the condition of the empty prompt."""
        model = self.model
        z, c = model.get_input(batch, model.first_stage_key, random)
        empty = model.get_unconditional_conditioning(len(z))
        return z, c, model.complete_condition(empty, batch, random)

    def x0(self, x: torch.Tensor, t: torch.Tensor, c: Any, empty: Any = None, scale: float = 1.0) -> torch.Tensor:
        """x_0 in x [B, C, h, w] at timesteps t [B], with guidance away from `empty` where it is given."""
        alpha, sigma = self.schedule.levels(t, x)
        return Denoiser(self.model, c, scale, empty).x0(x, t, alpha, sigma)

    def features(self, x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        """Features [B, F, h', w'] of x at timesteps t [B], from the middle of the network; the rest is not run."""

        def stop(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            raise _Reached(output)

        handle = self._middle.register_forward_hook(stop)
        try:
            self.model.apply_model(x, t, c)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise RuntimeError("the network ran without its middle")

    @property
    def _middle(self) -> nn.Module:
        """The middle block, or in a U-Net without one the last block of the way down."""
        middle = getattr(self.network, "middle_block", None)
        there = middle is not None and next(middle.parameters(), None) is not None
        return middle if there else self.network.input_blocks[-1]

    @property
    def feature_channels(self) -> int:
        """F of `features`."""
        return [m for m in self._middle.modules() if isinstance(m, nn.Conv2d)][-1].out_channels

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] of about [-1, 1] from latents."""
        return self.model.decode_first_stage(z)

    def words(self, batch: dict, prompts: Sequence[str] | None = None) -> list[Any]:
        """What is to be drawn: a batch's conditions, or `prompts` with all else from the batch."""
        return self.model.get_condition(batch) if not prompts else self.model.conditions_of(prompts, batch)

    def draw(
        self, words: Sequence[Any], batch: dict, steps: int, scale: float | None = None, seed: int = 0
    ) -> torch.Tensor:
        """Pictures [B, 3, H, W] of about [-1, 1] of `words`, from the noises of the seeds `seed`, seed + 1, ...

        Args:
            scale: of the guidance, by DPM-Solver++; None draws without it, by the sampler of latent consistency models.
        """
        model, count, guidance = self.model, len(words), {}
        c = model.complete_condition(model.get_learned_conditioning(words), batch)
        if scale is not None:
            empty = model.complete_condition(model.get_unconditional_conditioning(count), batch)
            guidance = dict(unconditional_guidance_scale=scale, unconditional_conditioning=empty)
        sampler = LCMSampler(model) if scale is None else DPMSolverSampler(model)
        samples, _ = sampler.sample(
            steps, count, model.get_latents(batch).shape[1:], c, generator=noises(seed, count),
            callback=abandon_pictures, verbose=False, show_progress=False, **guidance,
        )  # fmt: skip
        return self.decode(samples)

    def write_lora(self, path: Path) -> None:
        """Save the LoRA in the network, for diffusers and `--lora`."""
        weights = {f"model.diffusion_model.{key}": value for key, value in lora.weights_of(self.network).items()}
        files.write(weights, self.config["params"], path)
