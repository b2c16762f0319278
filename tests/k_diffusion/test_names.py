"""Code that was written for k-diffusion finds its names and arguments here."""

import inspect
import subprocess
import sys

import pytest

import ldm.k_diffusion as K
from ldm.k_diffusion.dpm_solver_class import DPMSolver
from ldm.k_diffusion.likelihood import log_likelihood

USUAL = "model x sigmas extra_args callback disable"
CHURNED, NOISY = f"{USUAL} s_churn s_tmin s_tmax s_noise", f"{USUAL} eta s_noise noise_sampler"
BETWEEN = "model x sigma_min sigma_max"
CONTROL = "order rtol atol h_init pcoeff icoeff dcoeff accept_safety eta s_noise noise_sampler"
ARGUMENTS = {
    "get_sigmas_karras": "n sigma_min sigma_max rho device",
    "get_sigmas_exponential": "n sigma_min sigma_max device",
    "get_sigmas_polyexponential": "n sigma_min sigma_max rho device",
    "get_sigmas_vp": "n beta_d beta_min eps_s device",
    "append_zero": "x",
    "to_d": "x sigma denoised",
    "get_ancestral_step": "sigma_from sigma_to eta",
    "default_noise_sampler": "x",
    "linear_multistep_coeff": "order t i j",
    "BatchedBrownianTree": "x t0 t1 seed",
    "BrownianTreeNoiseSampler": "x sigma_min sigma_max seed transform",
    "PIDStepSizeController": "h pcoeff icoeff dcoeff order accept_safety eps",
    "sample_euler": CHURNED,
    "sample_heun": CHURNED,
    "sample_dpm_2": CHURNED,
    "sample_euler_ancestral": NOISY,
    "sample_dpm_2_ancestral": NOISY,
    "sample_lms": f"{USUAL} order",
    "sample_dpm_fast": f"{BETWEEN} n extra_args callback disable eta s_noise noise_sampler",
    "sample_dpm_adaptive": f"{BETWEEN} extra_args callback disable {CONTROL} return_info",
    "sample_dpmpp_2s_ancestral": NOISY,
    "sample_dpmpp_sde": f"{NOISY} r",
    "sample_dpmpp_2m": USUAL,
    "sample_dpmpp_2m_sde": f"{NOISY} solver_type",
    "sample_dpmpp_3m_sde": NOISY,
}


@pytest.mark.parametrize("name, arguments", ARGUMENTS.items())
def test_arguments_come_in_upstreams_order(name, arguments):
    ours = list(inspect.signature(getattr(K.sampling, name)).parameters)
    assert ours[: len(arguments.split())] == arguments.split()
    needed = [p for p in inspect.signature(getattr(K.sampling, name)).parameters.values() if p.default is p.empty]
    assert {p.name for p in needed if p.kind is not p.VAR_KEYWORD} <= set(arguments.split())


def test_the_likelihood_and_the_solver_take_what_upstreams_take():
    assert list(inspect.signature(log_likelihood).parameters) == f"{BETWEEN} extra_args atol rtol".split()
    steps = [inspect.signature(getattr(DPMSolver, f"dpm_solver_{order}_step")) for order in (1, 2, 3)]
    more = [list(step.parameters)[4:] for step in steps]
    assert more == [["eps_cache"], ["r1", "eps_cache"], ["r1", "r2", "eps_cache"]]


def test_modules_are_attributes_that_cost_nothing_before():
    assert K.external.CompVisDenoiser and K.gns.GradientNoiseScale and K.models.image_v1.ImageDenoiserModelV1
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = K.nothing
    said = "import sys, ldm.k_diffusion; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True).stdout == "False\n"
