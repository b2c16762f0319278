"""The noise schedule: our yaml's keys and diffusers' scheduler_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.exchange.names import require
from ldm.modules.diffusionmodules.util import make_beta_schedule

WHERE_JSON = "scheduler/scheduler_config.json"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# LDM's "linear" is linear in the square root.
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
COSINE_S = 0.008  # the offset that both sides take when none is given
THEIR_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
THEIR_ONLY: dict[str, Any] = {"rescale_betas_zero_snr": False}


def to_diffusers(params: Mapping[str, Any]) -> dict[str, Any]:
    """`scheduler_config.json` for our `model.params`.

    The scheduler is PNDM, which is the PLMS of the original's scripts, and for models that predict v or x_0, which
    PNDM has no or another rule for, DDIM; with the original's timesteps.
    """
    kind = params.get("parameterization", "eps")
    schedule, timesteps = params.get("beta_schedule", "linear"), params.get("timesteps", 1000)
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    trained = params.get("given_betas")
    offset = params.get("cosine_s", COSINE_S)
    if trained is None and (schedule not in BETAS or offset != COSINE_S):
        trained = make_beta_schedule(schedule, timesteps, linear_start=start, linear_end=end, cosine_s=offset)
    plms = kind == "eps"
    return {
        "_class_name": "PNDMScheduler" if plms else "DDIMScheduler",
        "num_train_timesteps": len(trained) if trained is not None else timesteps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "linear" if trained is not None else BETAS[schedule],
        "trained_betas": None if trained is None else [float(beta) for beta in np.asarray(trained)],
        "prediction_type": PREDICTIONS[kind],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        **({"skip_prk_steps": True} if plms else {"clip_sample": False}),
    }


def from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of our `model.params` for a `scheduler_config.json`, of whatever scheduler.

    Raises:
        UserError: the model was trained with another kind of noise.
    """
    require(config, THEIR_ONLY, WHERE_JSON)
    if "FlowMatch" in str(config.get("_class_name")):
        raise UserError(f"{WHERE_JSON}: {config['_class_name']}: flow-matching models are not supported")
    config = THEIR_DEFAULTS | {k: v for k, v in config.items() if v is not None}
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    if config["prediction_type"] not in kinds:
        raise UserError(f"{WHERE_JSON}: prediction_type is '{config['prediction_type']}', not {', '.join(kinds)}")
    out: dict[str, Any] = {"timesteps": config["num_train_timesteps"]}
    if "trained_betas" in config:
        out["given_betas"] = list(config["trained_betas"])
        out["timesteps"] = len(out["given_betas"])
    else:
        schedules = {theirs: ours for ours, theirs in BETAS.items()}
        if config["beta_schedule"] not in schedules:
            raise UserError(f"{WHERE_JSON}: beta_schedule '{config['beta_schedule']}' is not supported")
        schedule = schedules[config["beta_schedule"]]
        out |= {"linear_start": config["beta_start"], "linear_end": config["beta_end"]}
        out |= {} if schedule == "linear" else {"beta_schedule": schedule}
    kind = kinds[config["prediction_type"]]
    return out | ({} if kind == "eps" else {"parameterization": kind})
