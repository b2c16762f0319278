"""How training noise is drawn: one callable `(x_start, random) -> noise`, chosen by `noise_config` in the yaml.

model:
  params:
    noise_config:
      target: ldm.modules.noise.ImmiscibleNoise
      params:
        method: assignment        # over the batch of all processes; or knn, which also helps at batch 1
        # k: 64                   # knn: draws a sample
        # offset_strength: 0.1
        # input_perturbation: 0.1
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ldm.modules.randomness import Randomness
from ldm.util import UserError

METHODS = ("assignment", "knn")
COLUMNS = 1024  # of the flattened samples, converted to float64 at a time
BLOCK = 2**21  # numbers of KNN's draws held at a time; larger blocks are slower on a CPU, whose caches they leave


class GaussianNoise:
    """Independent standard normal noise, the default.

    Args:
        offset_strength: adds one normal number a sample and channel times this to the whole channel, which lets a
            model learn very dark and very bright pictures (0 = off; Guttenberg, 2023: "Diffusion with offset noise").
        input_perturbation: in training the network sees noise that has this times fresh normal noise added, while its
            target keeps the noise as drawn (0 = off, the paper's value is 0.1; Ning et al., 2023: "Input perturbation
            reduces exposure bias in diffusion models", algorithm 1).

    Raises:
        UserError: a strength is no number of at least 0.
    """

    def __init__(self, offset_strength: float = 0.0, input_perturbation: float = 0.0) -> None:
        for name, value in (("offset_strength", offset_strength), ("input_perturbation", input_perturbation)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise UserError(f"yaml: noise_config: {name} is {value!r}; it must be a number of at least 0")
        self.offset_strength, self.input_perturbation = float(offset_strength), float(input_perturbation)
        self.seconds: float | None = None  # what pairing images and noise took, of the last step that is known

    def __call__(self, x_start: torch.Tensor, random: Randomness) -> torch.Tensor:
        """Noise of the shape [B, C, H, W] of `x_start`."""
        noise = self.pair(x_start, random)
        if self.offset_strength:
            noise = noise + self.offset_strength * random.randn_like(x_start[..., :1, :1])
        return noise

    def pair(self, x_start: torch.Tensor, random: Randomness) -> torch.Tensor:
        """Noise for each sample of `x_start`, before any offset."""
        return random.randn_like(x_start)

    def perturb(self, noise: torch.Tensor, random: Randomness) -> torch.Tensor:
        """What the network's input is made from in training: `noise`, or a perturbed copy of it."""
        return noise + self.input_perturbation * random.randn_like(noise) if self.input_perturbation else noise


class ImmiscibleNoise(GaussianNoise):
    """Noise that is near its image, so that images no longer mix in all of noise space, and training is faster.

    `assignment` deals the batch's noise out to the batch's images so that the sum of their Euclidean distances is
    the least (Li et al., 2024: "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment"). The
    batch is that of all processes: the result is the one that a single process has for the concatenated batch. The
    noise is only permuted, so it stays normal; with one sample there is nothing to permute.

    `knn` draws k noises for each image and takes the nearest, without a look at other images (the authors' follow-up,
    "Improved Immiscible Diffusion"). That bends the noise. With m the mean of the largest of k standard normal
    numbers, D numbers a sample, an image x of variance v (about 0) and s = sqrt(2 + 4 v), the noise has

        mean (given x) 2 m x / (s sqrt(D)),  mean square 1 - 2 m / (s sqrt(D)),

    up to terms of order 1/D: 0.970, and correlation 0.030 with the image, for k = 64, D = 4096, v = 1.

    Offsets are added afterwards, independent of the image.

    Args:
        method: `assignment` or `knn`.
        k: draws a sample, for knn.

    Raises:
        UserError: an argument is out of its range; or, when assignment is called, images that are no finite numbers
            or whose shapes differ between processes.
    """

    def __init__(
        self, method: str = "assignment", k: int = 64, offset_strength: float = 0.0, input_perturbation: float = 0.0
    ) -> None:
        super().__init__(offset_strength, input_perturbation)
        if method not in METHODS:
            raise UserError(f"yaml: noise_config: method is {method!r}; it may be {' or '.join(METHODS)}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise UserError(f"yaml: noise_config: k is {k!r}; it must be a whole number of at least 1")
        self.method, self.k = method, k
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @torch.no_grad()
    def pair(self, x_start: torch.Tensor, random: Randomness) -> torch.Tensor:
        with self.timed(x_start.device):
            if self.method == "knn":
                return nearest_of(x_start, random, self.k)
            return assigned(x_start, random.randn_like(x_start))

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Keep the block's `seconds`; on CUDA the device's own, read a step later so that nothing waits for them."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self.seconds = time.perf_counter() - start
            return
        if self.events is not None and self.events[1].query():
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self.events = events


# ---- assignment -----------------------------------------------------------------------------------------------


def assigned(x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`noise` [B, ...] dealt out anew among the samples `x_start` [B, ...] of all processes.

    Every process holds its own part of both and gets the noise of its own samples. The first process solves, so that
    no rounding on another machine can make two of them disagree.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        check_finite(bool(x_start.isfinite().all()))
        return noise[assign(x_start, noise).to(noise.device)]
    sizes = agree(x_start)
    everything = gather(noise, sizes)
    images = gather(x_start, sizes)
    order = torch.empty(sum(sizes), dtype=torch.long, device=noise.device)
    if dist.get_rank() == 0:
        order.copy_(assign(images, everything))
    dist.broadcast(order, src=0)
    first = sum(sizes[: dist.get_rank()])
    return everything[order[first : first + len(x_start)]]


def assign(x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Indices [B] such that noise[indices] is at the least total Euclidean distance from x_start [B, ...]."""
    from scipy.optimize import linear_sum_assignment

    if len(x_start) == 1:
        return torch.zeros(1, dtype=torch.long)
    cost = distances(x_start, noise)
    # Potentials of rows and columns change no assignment's rank, and spare the solver most of its search.
    cost -= cost.mean(0)
    cost -= cost.mean(1, keepdim=True)
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [B, B'] in float64 between samples [B, ...] and [B', ...], as |x|^2 + |y|^2 - 2 x.y.

    In float64 the expansion is as good as exact, and neither autocast nor TF32 touches it. Memory: the result and
    a thousand columns of the samples.
    """
    device = "cpu" if x.device.type == "mps" else x.device  # which has no float64
    x, y = x.flatten(1).to(device), y.flatten(1).to(device)
    squares = torch.zeros(len(x), len(y), dtype=torch.float64, device=device)
    x_norms, y_norms = squares.new_zeros(len(x), 1), squares.new_zeros(len(y))
    for a, b in zip(x.split(COLUMNS, dim=1), y.split(COLUMNS, dim=1), strict=True):
        a, b = a.double(), b.double()
        squares.addmm_(a, b.T, alpha=-2)
        x_norms += a.square().sum(1, keepdim=True)
        y_norms += b.square().sum(1)
    return squares.add_(x_norms).add_(y_norms).clamp_(min=0).sqrt_()


def agree(x: torch.Tensor) -> list[int]:
    """The batch sizes of all processes, which find out together whether the batch can be assigned."""
    header = torch.zeros(10, dtype=torch.long, device=x.device)
    header[: x.ndim] = torch.tensor(x.shape)
    header[-1] = x.isfinite().all()
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size())]
    dist.all_gather(headers, header)
    rows = [h.tolist() for h in headers]
    shapes = sorted({tuple(n for n in row[1:-1] if n) for row in rows})
    if len(shapes) > 1:
        said = " and ".join("x".join(map(str, shape)) for shape in shapes)
        raise UserError(f"noise: assignment: processes hold samples of {said}; use one size a step, or method: knn")
    check_finite(all(row[-1] for row in rows))
    return [row[0] for row in rows]


def gather(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The samples of all processes [sum(sizes), ...], in the order of their ranks."""
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def check_finite(finite: bool) -> None:
    if not finite:
        raise UserError("noise: the training images (or their latents) hold NaN or infinity; look at the data")


# ---- k nearest ------------------------------------------------------------------------------------------------


def nearest_of(x_start: torch.Tensor, random: Randomness, k: int) -> torch.Tensor:
    """For each sample of x_start [B, ...] the nearest of k noises drawn for it alone.

    A sample's draws are the same in any batch: how many are made at once depends on k and its size only.
    """
    size = x_start[0].numel()
    at_once = min(k, max(1, BLOCK // size))
    samples = max(1, BLOCK // (at_once * size))
    best = torch.empty_like(x_start)
    for first in range(0, len(x_start), samples):
        part = slice(first, first + samples)
        best[part] = nearest_in_block(x_start[part], random.part(part), k, at_once)
    return best


def nearest_in_block(x: torch.Tensor, random: Randomness, k: int, at_once: int) -> torch.Tensor:
    """`nearest_of` for samples that fit in memory with `at_once` draws each."""
    best, least = torch.zeros_like(x), torch.full((len(x),), float("inf"), device=x.device)
    every = torch.arange(len(x), device=x.device)
    for made in range(0, k, at_once):
        count = min(at_once, k - made)
        draws = random.randn_like(x.unsqueeze(1).expand(-1, count, *x.shape[1:]))
        # As a difference, for float32 is exact enough here, and a product could be rounded to TF32 or half precision.
        distance, which = (draws.float() - x.float().unsqueeze(1)).flatten(2).norm(dim=2).min(1)
        closer = ~(distance >= least)  # so that an image of NaN, whose loss is NaN, has noise as well
        best = torch.where(closer.view(-1, *[1] * (x.ndim - 1)), draws[every, which], best)
        least = torch.where(closer, distance, least)
    return best
