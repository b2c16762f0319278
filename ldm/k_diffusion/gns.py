"""The gradient noise scale: up to about which batch size a larger one is worth its computation.

McCandlish et al., "An Empirical Model of Large-Batch Training" (2018, arXiv 1812.06162), appendix A.1.
"""

from typing import Any  # annotations are no strings here: DistributedDataParallel looks at those of its hooks

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class GradientNoiseScale:
    """Estimates tr(Sigma) / |G|^2 from the squared norms of gradients of small and of large batches.

    G is the true gradient of the mean loss and Sigma the covariance of one sample's. A mean gradient over B samples
    has the expected squared norm |G|^2 + tr(Sigma) / B; two sizes of batch give the two unknowns. Both estimates are
    averaged over steps before they are divided, since the ratio of single ones is biased.

    Args:
        beta: decay of the averages.
        eps: the least |G|^2 that is divided by; a single run's estimate of it may be below 0.
    """

    def __init__(self, beta: float = 0.9998, eps: float = 1e-8) -> None:
        self.beta, self.eps = beta, eps
        self.ema_sq_norm, self.ema_var = 0.0, 0.0
        self.beta_cumprod = 1.0  # the share of the averages that is still their start, 0

    def update(
        self, sq_norm_small_batch: float, sq_norm_large_batch: float, n_small_batch: int, n_large_batch: int
    ) -> tuple[float, float]:
        """Take in a step, and give its own estimates of |G|^2 and tr(Sigma), without bias (equation A.1).

        Args:
            sq_norm_small_batch, sq_norm_large_batch: squared norms of mean gradients over so many samples; the small
                batches' may itself be a mean over several.
            n_small_batch, n_large_batch: how many samples.

        Raises:
            ValueError: the large batch is not larger.
        """
        if not 0 < n_small_batch < n_large_batch:
            raise ValueError(f"batches of {n_small_batch} and {n_large_batch} samples: the second must be larger")
        sq_norm = n_large_batch * sq_norm_large_batch - n_small_batch * sq_norm_small_batch
        sq_norm /= n_large_batch - n_small_batch
        var = (sq_norm_small_batch - sq_norm_large_batch) / (1 / n_small_batch - 1 / n_large_batch)
        self.ema_sq_norm += (1 - self.beta) * (sq_norm - self.ema_sq_norm)
        self.ema_var += (1 - self.beta) * (var - self.ema_var)
        self.beta_cumprod *= self.beta
        return sq_norm, var

    def get_stats(self) -> tuple[float, float]:
        """The averages of |G|^2 and tr(Sigma) so far; nan before the first step."""
        seen = 1 - self.beta_cumprod
        return (self.ema_sq_norm / seen, self.ema_var / seen) if seen else (float("nan"), float("nan"))

    def get_gns(self) -> float:
        """The gradient noise scale in samples."""
        sq_norm, var = self.get_stats()
        return var / max(sq_norm, self.eps)

    def state_dict(self) -> dict[str, Any]:
        """The averages, for a checkpoint."""
        return {name: getattr(self, name) for name in ("beta", "eps", "ema_sq_norm", "ema_var", "beta_cumprod")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from averages of `state_dict`, with the settings that they were made with."""
        for name in self.state_dict():
            setattr(self, name, state_dict[name])


class DDPGradientStatsHook:
    """Has DistributedDataParallel measure each process's own gradient before it is averaged, and the average after.

    Args:
        ddp_module: the wrapped module; it then averages gradients through this hook and can have no other.

    Raises:
        ValueError: the module is not wrapped.
    """

    def __init__(self, ddp_module: DistributedDataParallel) -> None:
        if not isinstance(ddp_module, DistributedDataParallel):
            raise ValueError(f"{type(ddp_module).__name__} is not wrapped in DistributedDataParallel")
        self.small: list[torch.Tensor] = []
        self.large: list[torch.Tensor] = []
        ddp_module.register_comm_hook(self, DDPGradientStatsHook._average)

    def _average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        own = bucket.buffer()
        self.small.append(own.float().square().sum())
        future = dist.all_reduce(own.div_(dist.get_world_size()), async_op=True).get_future()

        def measure(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            (mean,) = done.value()
            self.large.append(mean.float().square().sum())
            return mean

        return future.then(measure)

    def get_stats(self) -> tuple[float, float]:
        """The squared norms since the last call: of one process's gradient, a mean over them, and of the average."""
        small = torch.stack(self.small).sum() / dist.get_world_size()
        dist.all_reduce(small)
        large = float(torch.stack(self.large).sum())
        self.small, self.large = [], []
        return float(small), large
