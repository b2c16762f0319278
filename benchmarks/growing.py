"""Whether growing pays: the loss of a network that starts from a smaller one's, beside one that starts from nothing.

python benchmarks/growing.py --grow_from logs/RUN/checkpoints/last.ckpt       # of configs/karras/photos-32.yaml

Both train on the same images and noise. The loss is that of images not trained on, at noise that is the same each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
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
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and noise")
    options = parser.parse_args(argv)
    for path in (options.grow_from, options.config):
        if not Path(path).is_file():
            raise UserError(f"there is no file '{path}'")
    try:
        points = sorted({int(word) for word in options.points.split(",")})
    except ValueError as error:
        raise UserError(f"--points {options.points}: expected numbers, such as 0,50,100") from error

    curves = [curve(options, points, source) for source in (options.grow_from, None)]
    for point, grown, fresh in zip(points, *curves, strict=True):
        if point == points[0]:
            print("| steps | grown | from nothing |\n|---|---|---|")
        print(f"| {point} | {grown:.4f} | {fresh:.4f} |", flush=True)


def curve(options: Any, points: Sequence[int], grow_from: str | None) -> Iterator[float]:
    """The losses at `points` of a network that starts from a checkpoint, or from nothing."""
    import torch

    from ldm.util import instantiate_from_config, load_yaml

    config = load_yaml(options.config)
    config.model.params.grow_from = grow_from
    torch.manual_seed(options.seed)
    model = instantiate_from_config(config.model)
    model.learning_rate, model.seed = config.model.base_learning_rate, options.seed
    train, held_out = images_of(config, options.seed), images_of(config, options.seed + 1)
    (optimizer,), (schedule,) = model.configure_optimizers()
    size = config.data.params.batch_size
    for step in range(points[-1] + 1):
        if step in points:
            yield measure(model, held_out, options.samples, size)
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
