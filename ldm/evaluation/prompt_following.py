"""Does a model draw what the tiny world's captions say? Captions, judgements, table and labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.data.shapes import BACKGROUNDS, SIZES, SPLITS, Scene, ShapesDataset, render
from ldm.evaluation.shapes import compare, parse, read, shares
from ldm.evaluation.sheet import wrap

RIGHT, WRONG = (46, 125, 50), (198, 40, 40)


def evaluation_scenes(count: int, split: str = "test", seed: int = 0) -> list[Scene]:
    """`count` scenes of a split, every combination of its attributes equally often, in random order.

    Args:
        split: "test" has only the shape-colour pairs that training never shows, "train" only the others, "all" both.
    """
    scenes = [
        Scene(shape, colour, size, background)
        for shape, colour in SPLITS[split]
        for size in SIZES
        for background in BACKGROUNDS
    ]
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(scenes)) for _ in range(-(-count // len(scenes)))]
    return [scenes[i] for i in np.concatenate(rounds)[:count]]


@dataclass(frozen=True)
class Judgement:
    """One picture: what its caption asks for, what it shows, and which of that is right."""

    image: Image.Image
    caption: str
    seed: int
    shows: dict[str, str | None]
    right: dict[str, bool]

    def record(self) -> dict:
        """All but the image, for JSON."""
        return {
            "caption": self.caption,
            "seed": self.seed,
            "shows": self.shows,
            "right": self.right["all"],
        }


def judge(images: Sequence[Image.Image], captions: Sequence[str], seeds: Sequence[int]) -> list[Judgement]:
    """Read every picture and compare it with its caption."""
    judgements = []
    for image, caption, seed in zip(images, captions, seeds, strict=True):
        reading = read(image)
        judgements.append(Judgement(image, caption, seed, asdict(reading), compare(reading, parse(caption))))
    return judgements


def accuracy_of(judgements: Sequence[Judgement]) -> dict[str, float]:
    """The share that is right: by attribute and under "all"."""
    return shares([judgement.right for judgement in judgements])


def table(columns: dict[str, dict[str, float]]) -> str:
    """Accuracies as text: a row an attribute, a column a name in `columns`."""
    width = max(10, *(len(name) + 2 for name in columns))
    lines = [f"{'right in':<12}" + "".join(f"{name:>{width}}" for name in columns)]
    for attribute in next(iter(columns.values())):
        label = "everything" if attribute == "all" else attribute
        lines.append(f"{label:<12}" + "".join(f"{column[attribute]:>{width}.1%}" for column in columns.values()))
    return "\n".join(lines)


def check_reader(count: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """The reader on `count` true pictures of all pairs, with their own captions and with shuffled ones."""
    datasets = [ShapesDataset(split=split, length=count // 2, seed=seed) for split in ("train", "test")]
    scenes = [dataset.scene(i) for dataset in datasets for i in range(len(dataset))]
    readings, wanted = [read(render(scene)) for scene in scenes], [parse(scene.caption) for scene in scenes]
    order = np.random.default_rng(seed).permutation(len(scenes))
    return {
        "true": shares([compare(*pair) for pair in zip(readings, wanted, strict=True)]),
        "shuffled": shares([compare(readings[i], wanted[j]) for i, j in enumerate(order)]),
    }


def _label(judgement: Judgement) -> list[tuple[str, tuple[int, int, int]]]:
    """What is written below a picture: the wanted words, and in red what was read in place of wrong ones."""
    wanted = asdict(parse(judgement.caption))
    words = {name: word for name, word in wanted.items() if word}
    first = " ".join(words[name] for name in ("size", "colour", "shape") if name in words)
    lines = [
        (first, (40, 40, 40)),
        (f"on {words['background']}" if "background" in words else "", (40, 40, 40)),
    ]
    wrong = [judgement.shows[name] or f"no {name}" for name in words if not judgement.right[name]]
    if judgement.shows["size"] is None:
        wrong = ["no object"]
    return [*lines, (f"shows {', '.join(wrong)}", WRONG) if wrong else ("right", RIGHT)]


def labelled_grid(judgements: Sequence[Judgement], columns: int = 10, side: int = 128) -> Image.Image:
    """All pictures with their captions below, framed green where right and red where wrong."""
    font, line, gap = ImageFont.load_default(size=11), 13, 8
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [
        [(part, colour) for text, colour in _label(judgement) for part in wrap(measure, text, side, font)]
        for judgement in judgements
    ]
    columns = max(1, min(columns, len(judgements)))
    rows = -(-len(judgements) // columns)
    width, height = side + gap, side + max(map(len, labels), default=0) * line + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (judgement, label) in enumerate(zip(judgements, labels, strict=True)):
        x, y = gap + i % columns * width, gap + i // columns * height
        draw.rectangle([x - 2, y - 2, x + side + 1, y + side + 1], fill=RIGHT if judgement.right["all"] else WRONG)
        sheet.paste(judgement.image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for j, (text, colour) in enumerate(label):
            draw.text((x, y + side + 2 + j * line), text, fill=colour, font=font)
    return sheet


Draw = Callable[[list[str], list[int]], list[Image.Image]]


def evaluate(draw: Draw, count: int, split: str = "test", seed: int = 0) -> list[Judgement]:
    """Let a model draw `count` captions of a split and judge the pictures.

    Args:
        draw: captions and seeds (one a caption) -> PIL images.
        seed: of the choice of captions and of the first picture; picture i has the seed `seed + i`.
    """
    captions = [scene.caption for scene in evaluation_scenes(count, split, seed)]
    seeds = [seed + i for i in range(count)]
    return judge(draw(captions, seeds), captions, seeds)
