"""k-diffusion's samplers behind the samplers' interface, for the models of this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ldm.errors import UserError
from ldm.k_diffusion import named
from ldm.k_diffusion.external import DiscreteSchedule, sigmas_of
from ldm.k_diffusion.schedules import append_zero
from ldm.models.diffusion.sampling import Run, Sampler
from ldm.samplers import SAMPLERS, SCHEDULES, WITH_RHO

CHOICES = {choice.settings["sampler"]: choice for choice in SAMPLERS.values() if "sampler" in choice.settings}
# Levels at timesteps evenly apart, from the last one to the first, or with that one left out: next to no noise is left
# there, on which a call would be spent.
OWN: dict[str, Callable[[DiscreteSchedule, int], torch.Tensor]] = {
    "uniform": lambda levels, n: levels.get_sigmas(n),
    "sgm_uniform": lambda levels, n: append_zero(levels.get_sigmas(n + 1)[:-2]),
}


@dataclass
class Network:
    """A run's guided model as D(x, sigma), whose evaluations the progress bar counts.

    Where something is known, D says so: there x follows x_0 + sigma * noise exactly, in every sampler, to the end.
    """

    levels: DiscreteSchedule
    run: Run
    bar: tqdm

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The denoised x [B, ...] at levels sigma [B], all the same."""
        level = sigma[:1].view(-1, *([1] * (x.ndim - 1)))
        alpha = (1 + level**2).rsqrt()
        denoised = self.run.denoiser.x0(alpha * x, self.levels.sigma_to_t(sigma), alpha, alpha * level)
        self.bar.update()
        return denoised if self.run.mask is None else torch.lerp(denoised, self.run.x0, self.run.mask)


class KarrasSampler(Sampler):
    """One of k-diffusion's samplers.

    Args:
        schedule: the levels of noise, from the model's highest to its lowest one: `uniform` (its own, at timesteps
            evenly apart), `karras`, `exponential`, `polyexponential` or `vp`; or `sgm_uniform`, which is uniform too
            but leaves the lowest one out.
        sampler: the name in `ldm.k_diffusion.sampling`, without sample_.
        rho: of the schedules karras (7) and polyexponential (1).
        settings: more arguments of that function, e.g. eta, s_churn.

    Raises:
        UserError: there is no such sampler or schedule.
    """

    def __init__(
        self,
        model: Any,
        schedule: str | None = None,
        *,
        sampler: str = "euler",
        rho: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model)
        if sampler not in CHOICES:
            raise UserError(f"sampler: '{sampler}' is none of {', '.join(CHOICES)}")
        if schedule not in (None, *SCHEDULES):
            raise UserError(f"schedule: '{schedule}' is none of {', '.join(SCHEDULES)}")
        if rho is not None and schedule not in WITH_RHO:
            raise UserError(f"rho: only the schedules {' and '.join(WITH_RHO)} have it")
        for name in settings:
            if not named.takes(sampler, name):
                raise UserError(f"{name}: the sampler {sampler} has no such setting")
        self.kind, self.schedule, self.rho, self.settings = sampler, schedule or "uniform", rho, settings
        sigmas = sigmas_of(model.alphas_cumprod.cpu().double()).to(model.alphas_cumprod)
        self.levels = DiscreteSchedule(sigmas, quantize=False)
        self.ends = float(sigmas[0]), float(sigmas[-1])
        self.name = CHOICES[sampler].title

    def make_schedule(self, steps: int, *, ddim_eta: float = 0.0) -> None:
        """`steps` + 1 levels of noise; the last one is 0, or the model's lowest for what finds its own steps."""
        if ddim_eta:
            raise UserError(f"ddim_eta {ddim_eta:g}: is DDIM's; the others' noise is the setting eta")
        total = self.ddpm_num_timesteps
        if not 1 <= steps <= total:
            raise UserError(f"sampling steps: {steps} is not within 1 .. {total}, the model's timesteps")
        rho = {} if self.rho is None else {"rho": self.rho}

        def schedule(n: int) -> torch.Tensor:
            if self.schedule in OWN:
                return OWN[self.schedule](self.levels, n)
            return named.SCHEDULES[self.schedule](n, *self.ends, **rho)

        self.steps, self.sigmas = steps, named.levels_of(self.kind, steps, schedule).to(self.model.betas.device)

    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The sample that x, as noisy as the schedule is before its last `run.steps`, leads to."""
        sigmas = self.sigmas[self.steps - run.steps :]
        x = x * (1 + sigmas[0] ** 2).sqrt()
        settings = dict(self.settings)
        if named.takes(self.kind, "s_noise"):
            settings["s_noise"] = settings.get("s_noise", 1.0) * run.temperature
        count = CHOICES[self.kind].evaluations
        total = count and count(run.steps)
        with tqdm(total=total, desc=self.name, unit="call", leave=False, disable=not run.show_progress) as bar:
            network, tell = Network(self.levels, run, bar), self.watched(run, sigmas)
            x = named.sample(self.kind, network, x, sigmas, self.generator, self.ends, tell, settings)
        if self.kind in named.BETWEEN_TWO:
            run.watch(run.steps - 1, x, x)
        return x, run.watch.intermediates

    def watched(self, run: Run, sigmas: torch.Tensor) -> Callable[[dict[str, Any]], None]:
        """The samplers' callback, for the run's watch; what finds its own steps says how far it came in log sigma."""

        def tell(info: dict[str, Any]) -> None:
            i = info["i"]
            if self.kind in named.BETWEEN_TWO:
                share = (sigmas[0] / info["sigma"]).log() / (sigmas[0] / sigmas[-1]).log()
                i = min(int(share * run.steps), run.steps - 1)
            run.watch(i, info["x"] * (1 + info["sigma_hat"] ** 2).rsqrt(), info["denoised"])

        return tell

    @torch.no_grad()
    def stochastic_encode(
        self, x0: torch.Tensor, t: torch.Tensor | int, noise: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x0 noised so that `t` steps of the schedule are left; t = S starts from the highest noise."""
        sigma = self.sigmas[self.steps - int(torch.as_tensor(t).reshape(-1)[0])]
        noise = self.normal(x0) if noise is None else noise
        return (x0 + sigma * noise) * (1 + sigma**2).rsqrt()
