"""What the samplers share: guidance, random numbers a picture, previews, known regions, the progress bar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator] | None
Factor = torch.Tensor | float


def ddim_timesteps(steps: int, num_timesteps: int, method: str = "uniform") -> np.ndarray:
    """`steps` of the training timesteps 0 .. num_timesteps - 1, ascending (Song et al., 2021, appendix D.2).

    `uniform` takes every c-th, c = num_timesteps // steps, which may give a few more than `steps`, as the original.

    Raises:
        UserError: steps is not within 1 .. num_timesteps, or the method is unknown.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"sampling steps: {steps} is not within 1 .. {num_timesteps}, the model's timesteps")
    if method == "uniform":
        chosen = np.arange(0, num_timesteps, num_timesteps // steps)
    elif method == "quad":
        chosen = (np.linspace(0, np.sqrt(num_timesteps * 0.8), steps) ** 2).astype(int)
    else:
        raise UserError(f"ddim_discretize: '{method}' is neither uniform nor quad")
    return chosen + 1 if chosen[-1] + 1 < num_timesteps else chosen


def draw_normal(shape: Sequence[int], generator: Generators, device: torch.device | str) -> torch.Tensor:
    """Standard normal numbers [B, ...]; with a list of generators, picture i's come from generator i alone."""
    if generator is None:
        return torch.randn(tuple(shape), device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(device)


def joined(a: Any, b: Any) -> Any:
    """Two conditions of one form (tensor, list, dict of lists) as one batch."""
    if isinstance(a, torch.Tensor):
        return torch.cat([a, b])
    if isinstance(a, dict):
        return {key: joined(a[key], b[key]) for key in a}
    return [joined(x, y) for x, y in zip(a, b, strict=True)]


@dataclass
class Denoiser:
    """A model, its condition and guidance as one function of (x, t).

    eps = eps(x, empty) + scale * (eps(x, cond) - eps(x, empty)) (Ho & Salimans, 2022), both halves in one batch;
    the scale 1, or no unconditional condition, takes one half only.
    """

    model: Any
    conditioning: Any
    scale: float = 1.0
    unconditional: Any = None

    def __post_init__(self) -> None:
        self.guided = self.unconditional is not None and self.scale != 1.0
        self.both = joined(self.unconditional, self.conditioning) if self.guided else self.conditioning

    def output(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's guided output for x [B, ...] at timesteps t [B], in x's dtype."""
        if not self.guided:
            return self.model.apply_model(x, t, self.both).to(x.dtype)
        both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), self.both)
        empty, full = both.to(x.dtype).chunk(2)
        return torch.lerp(empty, full, self.scale)

    def eps(self, x: torch.Tensor, t: torch.Tensor, alpha: Factor, sigma: Factor) -> torch.Tensor:
        """The noise in x = alpha x_0 + sigma eps, whatever the network predicts."""
        out = self.output(x, t)
        kind = self.model.parameterization
        if kind == "v":
            return alpha * out + sigma * x
        return (x - alpha * out) / sigma if kind == "x0" else out

    def x0(self, x: torch.Tensor, t: torch.Tensor, alpha: Factor, sigma: Factor) -> torch.Tensor:
        """The clean x_0 in x = alpha x_0 + sigma eps."""
        out = self.output(x, t)
        kind = self.model.parameterization
        if kind == "v":
            return alpha * x - sigma * out
        return out if kind == "x0" else (x - sigma * out) / alpha


@dataclass
class Watch:
    """Callbacks and intermediates of one run: `callback(i)` and `img_callback(pred_x0, i)` after every step."""

    x: torch.Tensor
    total: int
    every: int = 100
    callback: Callable[[int], None] | None = None
    img_callback: Callable[[torch.Tensor, int], None] | None = None

    def __post_init__(self) -> None:
        self.intermediates: dict[str, list[torch.Tensor]] = {"x_inter": [self.x], "pred_x0": [self.x]}

    def __call__(self, i: int, x: torch.Tensor, pred_x0: torch.Tensor) -> None:
        if self.callback is not None:
            self.callback(i)
        if self.img_callback is not None:
            self.img_callback(pred_x0, i)
        left = self.total - 1 - i
        if left % self.every == 0 or left == self.total - 1:
            self.intermediates["x_inter"].append(x)
            self.intermediates["pred_x0"].append(pred_x0)


@dataclass
class Run:
    """The way from an x to a sample.

    Args:
        steps: the last so many of the schedule.
        mask, x0: where mask is 1, x0's content is kept.
        temperature: factor of the noise that the steps draw.
    """

    denoiser: Denoiser
    steps: int
    watch: Watch
    mask: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    temperature: float = 1.0
    show_progress: bool = True


class Sampler(ABC):
    """Base of the samplers: their interface, how a run begins, and how a known region is kept.

    A sampler has a schedule and a way through it, `make_schedule` and `run`. The model has `apply_model`,
    `alphas_cumprod` and `parameterization`.
    """

    name = "Sampler"

    def __init__(self, model: Any, schedule: str = "linear", **kwargs: Any) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.generator: Generators = None
        self.steps = 0  # of the schedule
        self.total = 0  # steps of the present run
        self.ddim_eta = 0.0

    @abstractmethod
    def make_schedule(self, steps: int, *, ddim_eta: float = 0.0) -> None:
        """Choose the timesteps, set `self.steps`, and compute every step's coefficients once.

        Raises:
            UserError: the sampler cannot take so many steps, or draws no noise in them.
        """

    @abstractmethod
    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The sample that x leads to, and intermediates {x_inter, pred_x0}."""

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        verbose: bool = True,
        x_T: torch.Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        generator: Generators = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Samples [batch_size, *shape] in S steps, and intermediates {x_inter, pred_x0}.

        Args:
            eta: 0 deterministic, 1 as much fresh noise as the trained process.
            mask, x0: where mask is 1, x0's content is kept.
            x_T: the starting noise. generator: one for all, or a list with one a picture.
        """
        self.generator = generator
        self.make_schedule(S, ddim_eta=eta)
        denoiser = Denoiser(self.model, conditioning, unconditional_guidance_scale, unconditional_conditioning)
        x, self.total = self.begin(batch_size, shape, x_T), self.steps
        watch = Watch(x, self.steps, log_every_t, callback, img_callback)
        return self.run(x, Run(denoiser, self.steps, watch, mask, x0, temperature, show_progress))

    @torch.no_grad()
    def decode(
        self,
        x_latent: torch.Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        generator: Generators = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        show_progress: bool = True,
    ) -> torch.Tensor:
        """The last `t_start` steps from a noised x_latent, as after `stochastic_encode`."""
        if use_original_steps:
            self.make_schedule(self.ddpm_num_timesteps, ddim_eta=self.ddim_eta)
        if generator is not None:
            self.generator = generator
        denoiser = Denoiser(self.model, cond, unconditional_guidance_scale, unconditional_conditioning)
        start = self.total = min(int(t_start), self.steps)
        watch = Watch(x_latent, start, callback=callback, img_callback=img_callback)
        return self.run(x_latent, Run(denoiser, start, watch, mask, x0, show_progress=show_progress))[0]

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Fresh noise of the shape of `like`, from the run's generators."""
        return draw_normal(like.shape, self.generator, like.device)

    def begin(self, batch_size: int, shape: Sequence[int], x_T: torch.Tensor | None) -> torch.Tensor:
        """The start [B, *shape]: `x_T`, or noise."""
        device = self.model.betas.device
        return x_T.to(device) if x_T is not None else draw_normal((batch_size, *shape), self.generator, device)

    def keep_known(self, x: torch.Tensor, t: torch.Tensor, run: Run) -> torch.Tensor:
        """x with the run's x0, noised to timestep t, where its mask is 1."""
        if run.mask is None:
            return x
        return self.model.q_sample(run.x0, t, noise=self.normal(run.x0)) * run.mask + (1.0 - run.mask) * x

    def bar(self, steps: Iterable, total: int, run: Run) -> Iterator:
        """`steps` with a progress bar when the run shows one."""
        if not run.show_progress:
            return iter(steps)
        return iter(tqdm(steps, total=total, desc=self.name, unit="step", leave=False))
