"""Log-likelihoods under a denoiser, by the probability flow ODE: exact up to the solver's error and a trace's estimate.

Along dx/dsigma = d(x, sigma) = (x - D(x, sigma)) / sigma (Karras et al., 2022, equation 1) the log-density of what is
carried along falls by the divergence of d. So log p_min(x) = log p_max(x(sigma_max)) + the integral of that
divergence (Song et al., 2021, "Score-Based Generative Modeling through SDEs", equation 39), where p_max is taken for
N(0, sigma_max^2) and p_min is the data with noise of sigma_min. The divergence is estimated by v^T (dd/dx) v with
v of +1 and -1 at random (Hutchinson, 1989; Grathwohl et al., 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.k_diffusion.steps import Model, to_d


@dataclass(frozen=True)
class Likelihood:
    """Estimates for a batch.

    Args:
        each: [K, B], the log-likelihoods in nats that every probe gives.
        evaluations: how often the model was called.
    """

    each: torch.Tensor
    evaluations: int

    @property
    def nats(self) -> torch.Tensor:
        """[B], the mean over the probes."""
        return self.each.mean(0)

    @property
    def error(self) -> torch.Tensor:
        """[B], the standard error of that mean; nan for a single probe. The solver's error is not in it."""
        return self.each.std(0) / math.sqrt(len(self.each))


def log_likelihood(
    model: Model,
    x: torch.Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[torch.Tensor, dict[str, int]]:
    """Log-likelihoods [B] in nats of x [B, ...], by one probe, and {"fevals": calls of the model}; see `estimate`."""
    found = estimate(model, x, sigma_min, sigma_max, rademacher(x, 1), extra_args, atol, rtol)
    return found.nats, {"fevals": found.evaluations}


def rademacher(x: torch.Tensor, count: int, generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
    """Probes [count, B, ...] of +1 and -1 for x [B, ...].

    Args:
        generators: one a sample, whose probes then do not depend on the batch; None for torch's global one.
    """
    shape = (count, *x.shape[1:])
    if generators is None:
        return 2 * torch.randint(2, (count, *x.shape), device=x.device).to(x) - 1
    drawn = [torch.randint(2, shape, generator=generator, device=generator.device) for generator in generators]
    return 2 * torch.stack(drawn, dim=1).to(x) - 1


@torch.no_grad()
def estimate(
    model: Model,
    x: torch.Tensor,
    sigma_min: float,
    sigma_max: float,
    probes: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> Likelihood:
    """Log-likelihoods of x [B, ...] as samples of the data with noise of sigma_min.

    Args:
        model: D(x, sigma), through which gradients can flow.
        probes: [K, B, ...] of `rademacher`; all of them share the model's calls, but each has its own gradient.
        atol, rtol: tolerances of the solver, Dormand and Prince's of order 5 with its own steps.
    """
    from torchdiffeq import odeint

    evaluations = 0

    def change(sigma: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            d = to_d(point, sigma, model(point, sigma.expand(len(point)), **(extra_args or {})))
            slopes = [torch.autograd.grad(d, point, v, retain_graph=True)[0] for v in probes]
        return d.detach(), (torch.stack(slopes) * probes).flatten(2).sum(2)

    levels = torch.tensor([sigma_min, sigma_max], dtype=x.dtype, device=x.device)
    start = x, x.new_zeros(probes.shape[:2])
    carried, divergence = odeint(change, start, levels, atol=atol, rtol=rtol, method="dopri5")
    prior = torch.distributions.Normal(0.0, sigma_max).log_prob(carried[-1]).flatten(1).sum(1)
    return Likelihood(prior + divergence[-1], evaluations)


def bits_per_dim(nats: torch.Tensor, dimensions: int, width: float = 1.0) -> torch.Tensor:
    """Bits a value that log-likelihoods mean.

    Args:
        dimensions: values of a sample.
        width: of the cells that values were rounded to, in the model's units, and spread over again (Theis et al.,
            2016): 2 / 255 for pixels in [-1, 1]. With 1 they are bits of a density, which may be below 0.
    """
    return -nats / (dimensions * math.log(2)) - math.log2(width)
