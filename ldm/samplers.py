"""The samplers and noise schedules that people choose by name, and what each can be told. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.errors import UserError

CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
SOLVER = ("algorithm", "order", "method", "spacing", "thresholding", "thresholding_max_val")
ADAPTIVE = ("order", "rtol", "atol", "h_init", "pcoeff", "icoeff", "dcoeff", "accept_safety")


@dataclass(frozen=True)
class SamplerChoice:
    """Where a sampler is, and what people call it.

    Args:
        module, name: the class. settings: what it is always told.
        title: as AUTOMATIC1111's web UI says it; None when the sampler's own `name` says it.
        eta: the noise of its steps when nothing is said; None for one that draws none.
        takes: names of the settings that people may choose.
        scheduled: it follows any of `SCHEDULES`.
        alone: pictures of a batch would share their steps, so that each is drawn alone.
        evaluations: calls of the network in n steps; None where that depends on the picture.
    """

    module: str
    name: str
    title: str | None
    eta: float | None = None
    takes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    scheduled: bool = False
    alone: bool = False
    evaluations: Callable[[int], int] | None = lambda n: n


def _karras(sampler: str, title: str, **choice: Any) -> SamplerChoice:
    """One of k-diffusion's."""
    settings = {"sampler": sampler}
    return SamplerChoice(
        "ldm.models.diffusion.karras", "KarrasSampler", title, **{"settings": settings, "scheduled": True} | choice
    )


def _two_a_step(n: int) -> int:
    return 2 * n - 1  # the last step, to no noise, takes one


def _noisy(*more: str) -> dict[str, Any]:
    return {"eta": 1.0, "takes": ("s_noise", *more)}


SAMPLERS = {
    "ddim": SamplerChoice("ldm.models.diffusion.ddim", "DDIMSampler", "DDIM", eta=0.0),
    "plms": SamplerChoice("ldm.models.diffusion.plms", "PLMSSampler", "PLMS", evaluations=lambda n: n + 1),
    "dpm_solver": SamplerChoice("ldm.models.diffusion.dpm_solver", "DPMSolverSampler", None, takes=SOLVER),
    "lcm": SamplerChoice("ldm.models.diffusion.lcm", "LCMSampler", "LCM", takes=("original_steps",)),
    "euler": _karras("euler", "Euler", takes=CHURN),
    "euler_ancestral": _karras("euler_ancestral", "Euler a", **_noisy()),
    "heun": _karras("heun", "Heun", takes=CHURN, evaluations=_two_a_step),
    "dpm_2": _karras("dpm_2", "DPM2", takes=CHURN, evaluations=_two_a_step),
    "dpm_2_ancestral": _karras("dpm_2_ancestral", "DPM2 a", **_noisy(), evaluations=_two_a_step),
    "lms": _karras("lms", "LMS", takes=("order",)),
    "dpm_fast": _karras("dpm_fast", "DPM fast", eta=0.0, takes=("s_noise",), scheduled=False),
    "dpm_adaptive": _karras(
        "dpm_adaptive", "DPM adaptive", eta=0.0, takes=("s_noise", *ADAPTIVE), scheduled=False, alone=True,
        evaluations=None,
    ),
    "dpmpp_2s_ancestral": _karras("dpmpp_2s_ancestral", "DPM++ 2S a", **_noisy(), evaluations=_two_a_step),
    "dpmpp_sde": _karras("dpmpp_sde", "DPM++ SDE", **_noisy("r"), evaluations=_two_a_step),
    "dpmpp_2m": _karras("dpmpp_2m", "DPM++ 2M"),
    "dpmpp_2m_sde": _karras("dpmpp_2m_sde", "DPM++ 2M SDE", **_noisy()),
    "dpmpp_2m_sde_heun": _karras(
        "dpmpp_2m_sde", "DPM++ 2M SDE Heun", **_noisy(),
        settings={"sampler": "dpmpp_2m_sde", "solver_type": "heun"},
    ),
    "dpmpp_3m_sde": _karras("dpmpp_3m_sde", "DPM++ 3M SDE", **_noisy()),
}  # fmt: skip

# Noise schedules of the samplers that are `scheduled`, with AUTOMATIC1111's words for them.
SCHEDULES = {
    "uniform": "",  # the model's own levels, at timesteps evenly apart
    "sgm_uniform": "SGM Uniform",  # the same without the lowest one, where there is next to no noise
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "vp": "VP",
}
WITH_RHO = ("karras", "polyexponential")

# What the web UI calls settings, in a picture's parameters.
A1111_WORDS = {
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma tmin",
    "s_tmax": "Sigma tmax",
    "s_noise": "Sigma noise",
    "rho": "Schedule rho",
}


def check_choice(
    sampler: str,
    schedule: str | None,
    eta: float | None,
    settings: Mapping[str, Any],
    say: Callable[[str], str] = str,
) -> None:
    """Raise UserError for a sampler, or for what goes with it, that cannot be.

    Args:
        say: what a setting is called where it came from, e.g. a flag's name.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"{say('sampler')}: '{sampler}' is none of {', '.join(SAMPLERS)}")
    choice = SAMPLERS[sampler]
    if schedule is not None:
        if schedule not in SCHEDULES:
            raise UserError(f"{say('schedule')}: '{schedule}' is none of {', '.join(SCHEDULES)}")
        if not choice.scheduled:
            raise UserError(f"{say('schedule')} {schedule}: the sampler {sampler} has its own steps; leave it out")
    if eta is not None:
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"{say('eta')} {eta:g}: must be between 0 and 1")
        if eta and choice.eta is None:
            raise UserError(
                f"{say('eta')} {eta:g}: the sampler {sampler} draws no noise in its steps that could be chosen; "
                f"{_noise_of()} do"
            )
    for name, value in settings.items():
        if name == "rho":
            if schedule not in WITH_RHO:
                raise UserError(f"{say('rho')}: only the schedules {' and '.join(WITH_RHO)} have it; choose one")
            if value <= 0:
                raise UserError(f"{say('rho')} {value:g}: must be above 0")
        elif name not in choice.takes:
            takers = [other for other, its in SAMPLERS.items() if name in its.takes]
            raise UserError(
                f"{say(name)}: the sampler {sampler} has no such setting; "
                + (f"{', '.join(takers)} have" if takers else f"it takes {', '.join(choice.takes) or 'none'}")
            )
        elif name in (*CHURN, "rtol", "atol", "h_init") and value < 0:
            raise UserError(f"{say(name)} {value:g}: must be 0 or more")


def _noise_of() -> str:
    return ", ".join(name for name, choice in SAMPLERS.items() if choice.eta is not None)


def title_of(sampler: str, schedule: str | None) -> str | None:
    """The web UI's words for a sampler with a schedule, e.g. DPM++ 2M Karras; None when it names itself."""
    title = SAMPLERS[sampler].title
    return title and f"{title} {SCHEDULES[schedule or 'uniform']}".strip()


def steps_within(sampler: str, evaluations: int) -> int | None:
    """The most steps that call the network at most so often; None where that is not known."""
    count = SAMPLERS[sampler].evaluations
    return count and max((n for n in range(1, evaluations + 1) if count(n) <= evaluations), default=1)
