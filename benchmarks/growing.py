"""Whether growing pays: the loss of a network that starts from a smaller one's, beside one that starts from nothing.

python benchmarks/growing.py --grow_from logs/RUN/checkpoints/last.ckpt       # of configs/karras/photos-32.yaml

Both train on the same images and noise. The loss is that of images not trained on, at noise that is the same each time;
with several seeds, its mean and standard deviation over them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Parse the flags, train both, print the table."""
    parser = cli.ArgumentParser(description="The loss of a grown network beside one from nothing, over training.")
    parser.add_argument("--grow_from", required=True, help="a checkpoint of the smaller network")
    parser.add_argument("--config", default="configs/karras/photos-64.yaml", help="yaml of the larger network")
    parser.add_argument("--points", default="0,25,50,100,200", help="steps after which the loss is measured")
    parser.add_argument("--samples", type=int, default=128, help="images that it is measured on")
    parser.add_argument("--seeds", default="0", help="of weights, images and noise, such as 0,1,2")
    options = parser.parse_args(argv)
    points, seeds = numbers("--points", options.points), numbers("--seeds", options.seeds)
    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: must be at least 1")
    for path in (options.grow_from, options.config):
        if not Path(path).is_file():
            raise UserError(f"there is no file '{path}'")

    grown, fresh = ([curve(options, points, seed, source) for seed in seeds] for source in (options.grow_from, None))
    for place, losses in enumerate(zip(*grown, *fresh, strict=True)):
        if place == 0:
            print("| steps | grown | from nothing |\n|---|---|---|")
        cells = (cell(losses[: len(seeds)]), cell(losses[len(seeds) :]))
        print(f"| {points[place]} | {' | '.join(cells)} |", flush=True)


def numbers(flag: str, text: str) -> list[int]:
    """The whole numbers, from 0, that a flag lists: each once, in order.

    Raises:
        UserError: it lists something else.
    """
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{flag} {text}: expected numbers, such as 0,50,100")
    return sorted({int(word) for word in words})


def cell(losses: Sequence[float]) -> str:
    """Their mean, and their standard deviation where there are several."""
    if len(losses) == 1:
        return f"{losses[0]:.3f}"
    return f"{mean(losses):.3f} ± {stdev(losses):.3f}"


def curve(options: Any, points: Sequence[int], seed: int, grow_from: str | None) -> Iterator[float]:
    """The losses at `points` of a network that starts from a checkpoint, or from nothing."""
    import torch

    from ldm.util import instantiate_from_config, load_yaml

    config = load_yaml(options.config)
    config.model.params.grow_from = grow_from
    torch.manual_seed(seed)
    model = instantiate_from_config(config.model)
    model.learning_rate, model.seed = config.model.base_learning_rate, seed
    train, held_out = images_of(config, seed), images_of(config, seed + 1)
    (optimizer,), (schedule,) = model.configure_optimizers()
    size = config.data.params.batch_size
    for step in range(points[-1] + 1):
        if step in points:
            yield measure(model, held_out, options.samples, size)
        if step == points[-1]:
            return
        model.train()
        loss, _ = model.shared_step(batch_of(train, step * size, size), model.step_random(size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule["scheduler"].step()
        model.batches_seen += 1


def images_of(config: Any, seed: int) -> Any:
    """The training set with another seed, so with other images."""
    from ldm.util import instantiate_from_config

    return instantiate_from_config(config.data.params.train, seed=seed)


def batch_of(images: Any, first: int, size: int) -> dict[str, Any]:
    """`size` of the images, from `first` on, over and over again."""
    import numpy as np
    import torch

    places = [place % len(images) for place in range(first, first + size)]
    return {"image": torch.from_numpy(np.stack([images[place]["image"] for place in places]))}


def measure(model: Any, images: Any, count: int, size: int) -> float:
    """The mean loss of the first `count` images."""
    import torch

    def loss(first: int) -> torch.Tensor:
        return model.shared_step(batch_of(images, first, size), model.random_of(-1 - first, size))[0]

    model.eval()
    with torch.no_grad():
        return float(torch.stack([loss(first) for first in range(0, count, size)]).mean())


if __name__ == "__main__":
    cli.run(main)
