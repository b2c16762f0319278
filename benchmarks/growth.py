"""How time and memory grow with what is asked for, beside how the mathematics grows, as a table and small plots.

python benchmarks/growth.py                             # Stable Diffusion v1's size; all axes
python benchmarks/growth.py --axes batch prompts        # only these
python benchmarks/growth.py --size tiny --rounds 1      # to see that it runs

resolution, batch, adapters: a pass of the U-Net, without what speeds up its convolutions while pictures are drawn; its
operations are counted. prompts: encoding one of so many
words; every prompt is padded to 77 tokens. images: setting up a training set of so many files, of which each is opened
once; item: fetching one of its samples.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import amount, head, seconds
from benchmarks.side_by_side import Job, Settings, count
from ldm import cli
from ldm.errors import UserError

BATCH = 2  # one guided picture
ADAPTER = {"type": "inout", "din": "attn2o", "dout": "ffni", "mid_dim": 60}


@dataclass(frozen=True)
class Axis:
    """What grows.

    Args:
        points: its values at full size and at tiny size.
        works: (settings, points) -> the work at each, and how much of it there is by its mathematics (None: the
            operations are counted).
        doublings: its values are drawn a doubling apart.
    """

    label: str
    points: tuple[tuple[int, ...], tuple[int, ...]]
    works: Callable[[Settings, Sequence[int]], Iterator[tuple[Callable[[], Any], float | None]]]
    doublings: bool = True


def _pass(unet: Any, batch: int, side: int, width: int) -> Callable[[], Any]:
    import torch

    like = next(unet.parameters())
    x, context = random_model.draw(batch, 4, side, side).to(like), random_model.draw(batch, 77, width).to(like)
    return partial(unet, x, torch.full((batch,), 500, device=like.device), context)


def resolutions(settings: Settings, points: Sequence[int]) -> Iterator[tuple[Callable[[], Any], None]]:
    unet = random_model.ours(settings).model.diffusion_model
    for pixels in points:
        yield _pass(unet, BATCH, pixels // 8, unet.context_dim), None


def batches(settings: Settings, points: Sequence[int]) -> Iterator[tuple[Callable[[], Any], None]]:
    unet = random_model.ours(settings).model.diffusion_model
    for batch in points:
        yield _pass(unet, batch, random_model.latent_side(settings), unet.context_dim), None


def adapted(settings: Settings, points: Sequence[int]) -> Iterator[tuple[Callable[[], Any], None]]:
    """One U-Net, into which as many adapter sets are put as the point says, and taken out again."""
    from ldm.modules import adapters

    unet = random_model.ours(settings).model.diffusion_model
    sets = [str(i) for i in range(max(points))]
    for name in sets:
        adapters.inject(unet, {"transformer_adp_config": [ADAPTER]}, name)
    once = _pass(unet, BATCH, random_model.latent_side(settings), unet.context_dim)

    def work(number: int) -> None:
        for i, name in enumerate(sets):
            adapters.enable(unet, i < number, name)
        once()

    for number in points:
        yield partial(work, number), None


def prompts(settings: Settings, points: Sequence[int]) -> Iterator[tuple[Callable[[], Any], None]]:
    model = random_model.ours(settings)
    for words in points:
        yield partial(model.get_learned_conditioning, [" ".join(["dog"] * words)]), None


def _folder(settings: Settings, number: int) -> Path:
    """So many small pictures."""
    import numpy as np
    from PIL import Image

    folder = settings.folder / f"images-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    for i in range(number - len(list(folder.iterdir()))):
        picture.save(folder / f"{number - 1 - i:05}.png")
    return folder


def image_sets(settings: Settings, points: Sequence[int]) -> Iterator[tuple[Callable[[], Any], float]]:
    from ldm.data.personalized_dream import PersonalizedBase

    for number in points:
        yield partial(PersonalizedBase, str(_folder(settings, number)), size=64), float(number)


def items(settings: Settings, points: Sequence[int]) -> Iterator[tuple[Callable[[], Any], float]]:
    from ldm.data.personalized_dream import PersonalizedBase

    for number in points:
        yield partial(PersonalizedBase(str(_folder(settings, number)), size=64).__getitem__, number // 2), 1.0


AXES = {
    "resolution": Axis("pixels a side", ((256, 384, 512, 768, 1024), (128, 256)), resolutions),
    "batch": Axis("samples a batch", ((1, 2, 4, 8, 16), (1, 2)), batches),
    "adapters": Axis("adapters a block", ((0, 1, 2, 3, 4), (0, 2)), adapted, doublings=False),
    "prompts": Axis("words of a prompt", ((1, 10, 25, 50, 75), (1, 75)), prompts, doublings=False),
    "images": Axis("training images", ((5, 50, 500, 5000), (5, 50)), image_sets),
    "item": Axis("training images", ((5, 50, 500, 5000), (5, 50)), items),
}


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--size", choices=("full", "tiny"), default="full", help="of the model")
    flag("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what grows")
    flag("--device", default="cpu", help="cpu (float32), or cuda (bf16)")
    flag("--rounds", type=int, default=3, help="runs of each point, of which the median counts")
    flag("--folder", help="where random weights and images are written, and kept (default: a temporary folder)")
    flag("--out", help="folder for the plots (default: none are drawn)")
    return parser


def measure(axis: Axis, settings: Settings, rounds: int) -> list[tuple[int, float, float, float]]:
    """(point, seconds, bytes beside what was there before, share of the mathematics of the first point)."""
    import torch

    from ldm.evaluation.cost import side_by_side

    points = axis.points[0 if settings.full else 1]
    with torch.inference_mode():
        works = dict(zip(points, axis.works(settings, points), strict=True))
        amounts = [given or float(count(Job(work))[0].flops) for work, given in works.values()]
        costs = side_by_side({p: work for p, (work, _) in works.items()}, rounds, torch.device(settings.device))
    return [
        (point, costs[point]["seconds"], costs[point]["bytes"], amount / amounts[0])
        for point, amount in zip(points, amounts, strict=True)
    ]


def table(name: str, axis: Axis, rows: Sequence[tuple[int, float, float, float]]) -> list[str]:
    """The points of an axis; what lies above 1 in the last column grew faster than its mathematics."""
    out = [f"{name}: {axis.label}", "", "| value | time | memory beside | mathematics | time / mathematics |",
           "|---|---|---|---|---|"]  # fmt: skip
    for point, time, room, share in rows:
        out.append(f"| {point} | {seconds(time)} | {amount(room)} | {share:.2f} | {time / rows[0][1] / share:.2f} |")
    return out


def plot(axis: Axis, rows: Sequence[tuple[int, float, float, float]]) -> Any:
    """Time and memory as two small diagrams."""
    from ldm.evaluation.plot import Panel, draw_panels

    ends = (rows[0][0], rows[-1][0]) if axis.doublings else None
    time = [(float(point), took) for point, took, _, _ in rows]
    by_mathematics = [(float(point), rows[0][1] * share) for point, _, _, share in rows]
    room = [(float(point), bytes_ / 2**20) for point, _, bytes_, _ in rows]
    curves = {"measured": [time], "as the mathematics grows": [by_mathematics]}
    return draw_panels(
        [
            Panel("seconds", axis.label, curves, doublings=ends),
            Panel("MiB beside what was there before", axis.label, {"measured": [room]}, doublings=ends),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Parse the flags, measure axis by axis, print tables, draw plots."""
    options = parser().parse_args(argv)
    if options.rounds < 1:
        raise UserError("--rounds must be at least 1")
    from ldm.memory import keep_freed
    from ldm.modules.pictures import save_picture
    from ldm.util import pick_device

    pick_device(options.device)
    keep_freed()  # as the programs that draw and train
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(options.size, options.device, Path(options.folder or temporary).resolve())
        print("\n".join(head(settings)), flush=True)
        random_model.write(settings)
        for name in options.axes:
            rows = measure(AXES[name], settings, options.rounds)
            print("", *table(name, AXES[name], rows), sep="\n", flush=True)
            if options.out:
                save_picture(plot(AXES[name], rows), Path(options.out) / f"growth-{name}.png")


if __name__ == "__main__":
    cli.run(main)
