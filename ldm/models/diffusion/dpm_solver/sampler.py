"""DPM-Solver and DPM-Solver++ behind the samplers' interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ldm.errors import UserError
from ldm.models.diffusion.dpm_solver.solver import Known, Solver, clipped
from ldm.models.diffusion.dpm_solver.spacing import SPACINGS, ContinuousTime, Point, grouped, singlestep_orders
from ldm.models.diffusion.sampling import Denoiser, Run, Sampler

FEW_STEPS = 15
ALGORITHMS = ("dpmsolver++", "dpmsolver")
METHODS = ("multistep", "singlestep")


class DPMSolverSampler(Sampler):
    """Deterministic; by default DPM-Solver++ 2M, uniform in time, as in the original.

    With fewer than 15 steps the last multistep updates are of lower order, which is steadier.

    Args:
        algorithm: `dpmsolver++` (predicts x_0; for guidance) or `dpmsolver` (predicts the noise).
        order: 1 (which is DDIM), 2 or 3.
        method: `multistep` (from the predictions before) or `singlestep` (from more of them inside a step;
            S counts evaluations of the network, not steps).
        spacing: `time_uniform`, `time_quadratic` or `logSNR`.
        thresholding: dynamic thresholding of x_0 (Saharia et al., 2022), for models of pixels within
            +-`thresholding_max_val`; latents have no such bounds.

    Raises:
        UserError: a setting is none of these.
    """

    name = "DPM-Solver"

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        *,
        algorithm: str = "dpmsolver++",
        order: int = 2,
        method: str = "multistep",
        spacing: str = "time_uniform",
        thresholding: bool = False,
        thresholding_max_val: float = 1.0,
    ) -> None:
        super().__init__(model, schedule)
        given = {"algorithm": algorithm, "order": order, "method": method, "spacing": spacing}
        allowed = {"algorithm": ALGORITHMS, "order": (1, 2, 3), "method": METHODS, "spacing": SPACINGS}
        for name, value in given.items():
            if value not in allowed[name]:
                raise UserError(f"DPM-Solver: {name} '{value}' is none of {', '.join(map(str, allowed[name]))}")
        self.order, self.method, self.spacing = order, method, spacing
        self.thresholding, self.largest = thresholding, thresholding_max_val
        self.time = ContinuousTime.of(model)
        self.solver = Solver(algorithm == "dpmsolver++", self.time)
        self.name = f"DPM{'++' if self.solver.data else ''} {order}{method[0].upper()}"

    def make_schedule(self, steps: int, *, ddim_eta: float = 0.0) -> None:
        """`steps` + 1 points, one for every evaluation of the network and the end."""
        if ddim_eta:
            raise UserError(f"DPM-Solver draws no noise in its steps: ddim_eta must be 0, not {ddim_eta}; use DDIM")
        total = self.ddpm_num_timesteps
        if not 1 <= steps <= total:
            raise UserError(f"sampling steps: {steps} is not within 1 .. {total}, the model's timesteps")
        self.steps, self.points = steps, self.time.spaced(self.spacing, steps)

    def run(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """The sample that x leads to by the last `run.steps` evaluations, and intermediates."""

        def predict(value: torch.Tensor, point: Point) -> torch.Tensor:
            return self.predict(run.denoiser, value, point)

        known: list[Known] = []
        updates = list(self.updates(run.steps))
        for here, end, order, done in self.bar(updates, len(updates), run):
            t = torch.full((len(x),), round(self.time.timestep(here)), device=x.device)
            x = self.keep_known(x, t, run)
            now = predict(x, here)
            pred_x0 = now if self.solver.data else (x - here.sigma * now) / here.alpha
            known = [(here, now), *known][: self.order]
            if self.method == "multistep":
                x = self.solver.multistep(x, end, known[:order])
            else:
                x = self.solver.singlestep(x, here, end, order, now, predict)
            run.watch(done - 1, x, pred_x0)
        return x, run.watch.intermediates

    def updates(self, count: int) -> Iterator[tuple[Point, Point, int, int]]:
        """(from, to, order, evaluations when it is done) of the steps that use the last `count` evaluations."""
        points = self.points[-(count + 1) :]
        if self.method == "multistep":
            few = len(self.points) - 1 < FEW_STEPS
            for i in range(count):
                left = count - i if few else self.order
                yield points[i], points[i + 1], min(self.order, left), i + 1
            return
        orders, done = singlestep_orders(self.order, count), 0
        if self.spacing == "logSNR":
            points = self.time.even_in_lam(points[0], points[-1], len(orders))
        else:
            points = grouped(points, orders)
        for here, end, order in zip(points, points[1:], orders, strict=False):
            done += order
            yield here, end, order, done

    def predict(self, denoiser: Denoiser, x: torch.Tensor, point: Point) -> torch.Tensor:
        """x_0 (the noise without ++) as the network sees it in x at `point`."""
        t = torch.full((len(x),), self.time.timestep(point), device=x.device)
        if not self.thresholding:
            ask = denoiser.x0 if self.solver.data else denoiser.eps
            return ask(x, t, point.alpha, point.sigma)
        x0 = clipped(denoiser.x0(x, t, point.alpha, point.sigma), largest=self.largest)
        return x0 if self.solver.data else (x - point.alpha * x0) / point.sigma

    @torch.no_grad()
    def stochastic_encode(
        self, x0: torch.Tensor, t: torch.Tensor | int, noise: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x0 noised so that `t` evaluations of the schedule are left; t = S starts from the highest noise."""
        point = self.points[len(self.points) - 1 - int(torch.as_tensor(t).reshape(-1)[0])]
        noise = self.normal(x0) if noise is None else noise
        return point.alpha * x0 + point.sigma * noise
