"""DPM-Solver and DPM-Solver++ (Lu et al., 2022, arXiv:2206.00927 and arXiv:2211.01095)."""

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler

__all__ = ["DPMSolverSampler"]
