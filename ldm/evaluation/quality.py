"""Scores of a folder of pictures: FID and KID against other pictures, CLIP score and accuracy against captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from ldm.data.base import list_images, open_image
from ldm.data.captions import caption_path, read_caption, read_table
from ldm.evaluation import inception, scene_features
from ldm.evaluation.distances import Statistics, frechet_distance, kernel_distance
from ldm.evaluation.shapes import compare, parse, read, shares
from ldm.util import UserError

MANIFEST = "manifest.jsonl"  # of scripts/generate.py: {"file": ..., "prompt": ..., "seed": ...} a line
TINY_WORLD = "tiny-world"  # the name of a reference that is drawn, not read
DRAWN = 10_000  # scenes of that reference
THREADS = 8  # that read and resize pictures
FEATURES = ("auto", "inception", "tiny")  # what `FeatureNet.pick` takes


@dataclass(frozen=True)
class FeatureNet:
    """What turns pictures into features: `net` takes [B, 3, size, size] in [-1, 1]; scores bear its name."""

    name: str
    net: nn.Module
    device: torch.device

    @classmethod
    def pick(cls, choice: str, weights: str | None, device: torch.device) -> FeatureNet:
        """`inception`, `tiny`, or `auto`: Inception where its weights are at hand, else the tiny world's net.

        Raises:
            UserError: the weights cannot be had.
        """
        if choice == "inception" or (choice == "auto" and (weights or inception.find())):
            return cls("Inception", inception.load(weights).to(device), device)
        if choice == "auto":
            print(
                "Inception's weights are not here (--features inception fetches them): measured by the tiny world's net"
            )
        return cls("tiny features", scene_features.load().to(device), device)

    @torch.inference_mode()
    def of_tensors(self, batches: Iterator[torch.Tensor]) -> np.ndarray:
        """Features [N, D] of pictures that come in batches [B, 3, size, size] in [-1, 1]."""
        return np.concatenate([self.net(batch.to(self.device)).cpu().numpy() for batch in batches])

    def of_files(self, paths: Sequence[Path], batch_size: int) -> np.ndarray:
        """Features [N, D] of image files, each resized alone to what the net takes."""
        return self.of_tensors(self._read(paths, batch_size))

    def of_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Features [N, D] of PIL images."""
        parts = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
        return self.of_tensors(torch.stack([self._prepared(image) for image in part]) for part in parts)

    def _read(self, paths: Sequence[Path], batch_size: int) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(paths), desc="Reading pictures", unit="") as bar:
            for first in range(0, len(paths), batch_size):
                part = paths[first : first + batch_size]
                yield torch.stack(list(pool.map(lambda path: self._prepared(open_image(path)), part)))
                bar.update(len(part))

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
        size = (self.net.size, self.net.size)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return pixels[0]

    def of_tiny_world(self, count: int = DRAWN, seed: int = 0) -> np.ndarray:
        """Features of scenes that the tiny world draws anew."""
        images, _ = scene_features.draw_scenes(count, seed)
        if self.net.size != images.shape[-1]:
            raise UserError(f"--reference {TINY_WORLD}: goes with --features tiny")
        return self.of_tensors(images.split(256))


@dataclass(frozen=True)
class Reference:
    """What pictures are compared with: statistics for FID, and where they are known the features, for KID."""

    statistics: Statistics
    features: np.ndarray | None

    @classmethod
    def read(cls, source: str, features: FeatureNet, batch_size: int) -> Reference:
        """From a folder of pictures, a .npz with mu and sigma, or `TINY_WORLD`.

        Raises:
            UserError: it is none of these, or of another feature net.
        """
        if Path(source).suffix == ".npz":
            statistics = Statistics.load(source)
            if statistics.mean.size != features.net.dimensions:
                raise UserError(
                    f"--reference: '{source}' has {statistics.mean.size} features, but {features.name} has "
                    f"{features.net.dimensions}; choose with --features"
                )
            return cls(statistics, None)
        if source == TINY_WORLD and not Path(source).exists():
            found = features.of_tiny_world()
        else:
            found = features.of_files(pictures_in(source), batch_size)
        return cls(Statistics.of(found), found)


def distances(found: np.ndarray, reference: Reference, name: str) -> dict[str, float]:
    """FID and, where the reference's features are known, KID; each under a name that tells the feature net."""
    scores = {f"FID ({name})": frechet_distance(Statistics.of(found), reference.statistics)}
    if reference.features is not None:
        mean, deviation = kernel_distance(found, reference.features)
        scores |= {f"KID ({name})": mean, f"KID ({name}), deviation over subsets": deviation}
    return scores


def pictures_in(folder: str | Path) -> list[Path]:
    """The image files of a folder and its sub-folders; two at least.

    Raises:
        UserError: there are fewer.
    """
    paths = list_images(folder, recursive=True)
    if len(paths) < 2:
        raise UserError(f"'{folder}' holds a single picture; a distance needs many")
    return paths


def captions_of(folder: str | Path, paths: Sequence[Path]) -> list[str] | None:
    """The caption of each picture of a folder: from its `MANIFEST`, or a .txt beside each; None where there are none.

    Raises:
        UserError: some have one and others not.
    """
    manifest = Path(folder) / MANIFEST
    if manifest.is_file():
        named = {row.get("file"): row.get("prompt") for row in read_table(manifest)}
        found = [named.get(path.relative_to(folder).as_posix()) for path in paths]
    elif any(caption_path(path).is_file() for path in paths[:100]):
        found = [read_caption(path) for path in paths]
    else:
        return None
    without = [path for path, caption in zip(paths, found, strict=True) if not isinstance(caption, str)]
    if without:
        raise UserError(
            f"'{folder}': {len(without)} of {len(paths)} pictures have no caption, such as {without[0].name}"
        )
    return found


def mean_clip_score(score: Callable, paths: Sequence[Path], captions: Sequence[str], batch_size: int) -> float:
    """The mean of `clip_score.load`'s scores over picture files."""
    total = 0.0
    for first in tqdm(range(0, len(paths), batch_size), desc="CLIP score", unit="batch"):
        part = slice(first, first + batch_size)
        total += float(score([open_image(path) for path in paths[part]], captions[part]).sum())
    return total / len(paths)


def reader_accuracy(paths: Sequence[Path], captions: Sequence[str]) -> dict[str, float]:
    """The share of pictures that the tiny world's reader finds right; nothing unless all captions are of that world."""
    if not all(any(asdict(parse(caption)).values()) for caption in captions):
        return {}
    pairs = zip(paths, captions, strict=True)
    right = shares([compare(read(open_image(path)), parse(caption)) for path, caption in pairs])
    return {f"prompt accuracy, {'everything' if name == 'all' else name}": share for name, share in right.items()}
