"""A folder with the posterior moments of a training set's images and the embeddings of its captions.

scripts/cache_latents.py writes it; `data.params.cache_latents: DIR` trains on it.

    manifest.json               what it was made of, and whether it is finished
    latents-00000.safetensors   "<index of the sample>" [V, 2C, h, w]; in its metadata what else the samples hold
    texts-00000.safetensors     embeddings [n, T, D]; in its metadata their captions
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ldm.data.latents import MomentsDataset, check_numbered, encode_samples, order_of
from ldm.errors import UserError
from ldm.processes import alone_in
from ldm.util import atomic_path

FORMAT = 1
MANIFEST = "manifest.json"
PROGRAM = ("python", "scripts/cache_latents.py")
SAMPLES_PER_FILE = 512
ANY_YAML = ("--base", "YAML")
EMPTY = ""


# ---- what a cache is made of -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Fingerprints of what a cache is made of; `texts` is None where captions are not encoded.

    `image_key` is what the samples call the image.
    """

    autoencoder: str
    texts: str | None
    data: str
    format: int = FORMAT
    image_key: str = "image"

    @classmethod
    def of(cls, model: nn.Module, dataset: Any, section: Any) -> Origin:
        """Of a model and its training set; `section` is the set's in the yaml.

        Raises:
            UserError: the set is a stream.
        """
        check_numbered(dataset)
        first_config, texts_config = model.stage_configs
        texts = fingerprint_encoder(model.cond_stage_model, texts_config) if has_frozen_texts(model) else None
        autoencoder = fingerprint_encoder(model.first_stage_model, first_config)
        data = fingerprint_data(dataset, section)
        return cls(autoencoder, texts, data, image_key=model.first_stage_key)

    def difference(self, other: Origin) -> str | None:
        """What of `other` is not what it is here, in words; None where nothing is."""
        if self.format != other.format:
            return "by another version of this program"
        if self.autoencoder != other.autoencoder:
            return "with another autoencoder"
        if self.texts and other.texts and self.texts != other.texts:
            return "with another text encoder"
        if self.image_key != other.image_key:
            return f"of '{self.image_key}', another first_stage_key"
        return "of other data (a file or data.params.train changed)" if self.data != other.data else None


def has_frozen_texts(model: nn.Module) -> bool:
    """Whether a model's condition is encoded by a part that is not trained, and has weights."""
    encoder = getattr(model, "cond_stage_model", None)
    return encoder is not None and not model.cond_stage_trainable and next(encoder.parameters(), None) is not None


def fingerprint_encoder(module: nn.Module, section: Any) -> str:
    """A hash of a module's yaml section and its weights by their names, but not of where these came from.

    Losses of its own training are left out.
    """
    section = plain(section)
    params = dict(section.get("params") or {}) if isinstance(section, Mapping) else {}
    told = {key: value for key, value in params.items() if key not in ("ckpt_path", "device", "lossconfig")}
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith("loss."):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(section: Any) -> Any:
    """A yaml section as dicts and lists."""
    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section


def fingerprint_data(dataset: Any, section: Any) -> str:
    """A hash of a set's yaml section, its length, and the paths, sizes and times of its files."""
    told = [plain(section), len(dataset)]
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16)
    for path in dataset.files() if hasattr(dataset, "files") else ():
        try:
            state = os.stat(path)
            digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path} -\n".encode())
    return digest.hexdigest()


# ---- files -------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], said: Any) -> None:
    """A safetensors file, whole or not at all, with `said` as JSON in its metadata."""
    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary, metadata={"said": json.dumps(said)})
    except TypeError as error:
        raise UserError(f"data: the samples hold something that cannot be cached: {error}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def read_said(path: Path) -> Any:
    """What `write_tensors` was told beside the tensors; None when the file is not there, or damaged."""
    try:
        return json.loads(safe_open(path, "pt").metadata()["said"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


class MappedFiles:
    """Safetensors files that every process maps on its own, when it first reads them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.mapped = list(paths), {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "mapped": {}}

    def __getitem__(self, number: int) -> Any:
        if number not in self.mapped:
            self.mapped[number] = safe_open(self.paths[number], "pt")
        return self.mapped[number]


class StoredMoments:
    """index -> moments [V, 2C, h, w], mapped from the files."""

    def __init__(self, paths: Sequence[Path], file_of: Mapping[int, int]) -> None:
        self.files, self.file_of = MappedFiles(paths), file_of

    def __call__(self, index: int) -> torch.Tensor:
        return self.files[self.file_of[index]].get_tensor(str(index))


class StoredTexts:
    """Stands in for a frozen text encoder: captions -> embeddings [B, T, D], from the files where they are there.

    A batch with a caption that is not there is encoded by `encode`, the encoder's own way.
    """

    def __init__(self, encoder: nn.Module, encode: Callable, paths: Sequence[Path]) -> None:
        self.encoder, self.encode, self.files = encoder, encode, MappedFiles(paths)
        self.place_of = {
            caption: (number, row) for number, path in enumerate(paths) for row, caption in enumerate(read_said(path))
        }

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        captions = [texts] if isinstance(texts, str) else list(texts)
        if not all(caption in self.place_of for caption in captions):
            return self.encode(texts)
        rows = []
        for caption in captions:
            number, row = self.place_of[caption]
            rows.append(self.files[number].get_slice("embeddings")[row])
        weights = next(self.encoder.parameters())
        return torch.stack(rows).to(weights.device, weights.dtype)


# ---- the cache ---------------------------------------------------------------------------------------------


def chunks(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """(number, part) of the parts of `items`, `size` each."""
    return ((start // size, items[start : start + size]) for start in range(0, len(items), size))


class LatentCache:
    """The cache in a folder: `build` makes it, `stand_in` trains on it."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def _paths(self, kind: str) -> list[Path]:
        return sorted(self.directory.glob(f"{kind}-*.safetensors"))

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / f"{kind}-{number:05}.safetensors"

    def manifest(self) -> dict[str, Any] | None:
        """What manifest.json says, None when there is none.

        Raises:
            UserError: it cannot be read.
        """
        path = self.directory / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            kept = {name: manifest[name] for name in ("layout", "finished")}
            return kept | {"origin": Origin(**manifest["origin"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = "give another folder, or delete this one if it is a cache and make it anew"
            raise UserError(f"{path} cannot be read as a cache's ({error!r}); {advice}") from None

    def command(self, words: Sequence[str], layout: Mapping[str, Any]) -> str:
        """The line that makes this cache; `words` are the flags that name a training's yaml and weights."""
        size = layout.get("samples_per_file", SAMPLES_PER_FILE)
        flags = [] if size == SAMPLES_PER_FILE else ["--samples_per_file", str(size)]
        flags += ["--half"] if layout.get("half") else []
        return shlex.join([*PROGRAM, *words, "--outdir", str(self.directory), *flags])

    # ---- writing ----

    def build(
        self,
        model: nn.Module,
        dataset: Any,
        section: Any,
        batch_size: int = 16,
        num_workers: int = 0,
        samples_per_file: int = SAMPLES_PER_FILE,
        half: bool = False,
    ) -> bool:
        """Encode what is not there yet; False when everything was. Files of another model or data are replaced.

        Raises:
            UserError: the folder holds something else or another process builds there, a file cannot be written, or
                the model cannot encode the set.
        """
        origin = Origin.of(model, dataset, section)
        with alone_in(self.directory):
            layout = {"samples_per_file": samples_per_file, "half": half}
            unfinished = self._prepare(origin, layout)
            dtype = torch.float16 if half else torch.float32
            worked = self._encode_images(model, dataset, batch_size, num_workers, samples_per_file, dtype)
            if origin.texts:
                worked |= self._encode_texts(model, batch_size, samples_per_file, dtype)
            if worked or unfinished:
                self._write_manifest(origin, layout, finished=True)
        return worked

    def _prepare(self, origin: Origin, layout: Mapping[str, Any]) -> bool:
        """Remove what is of another model, other data or a killed run; whether the cache is to be finished."""
        manifest = self.manifest()
        if manifest is None and self.directory.is_dir() and any(self.directory.iterdir()):
            raise UserError(f"{self.directory} holds other files and no {MANIFEST}; give an empty or a new folder")
        same = manifest is not None and (manifest["origin"], manifest["layout"]) == (origin, layout)
        for path in [] if manifest is None or same else [*self._paths("latents"), *self._paths("texts")]:
            path.unlink()
        for path in self.directory.glob(".*.tmp"):  # of a run that was killed
            path.unlink()
        if not same:
            self._write_manifest(origin, layout, finished=False)
        return not (same and manifest["finished"])

    def _write_manifest(self, origin: Origin, layout: Mapping[str, Any], finished: bool) -> None:
        said = {"origin": asdict(origin), "layout": layout, "finished": finished}
        try:
            with atomic_path(self.directory / MANIFEST) as temporary:
                temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.directory / MANIFEST} cannot be written: {error}") from None

    def _encode_images(
        self,
        model: nn.Module,
        dataset: Any,
        batch_size: int,
        num_workers: int,
        samples_per_file: int,
        dtype: torch.dtype,
    ) -> bool:
        parts = dict(chunks(order_of(dataset), samples_per_file))
        absent = [number for number in parts if read_said(self._path("latents", number)) is None]
        wanted = [index for number in absent for index in parts[number]]
        total = sum(map(len, parts.values()))
        encoded = encode_samples(
            dataset, wanted, model.first_stage_model, model.first_stage_key, batch_size, num_workers
        )
        with tqdm(total=total, initial=total - len(wanted), desc="Encoding the images", unit="image") as bar:
            for number in absent:
                tensors, said = {}, {}
                for _, (index, moments, rest) in zip(parts[number], encoded, strict=False):
                    tensors[str(index)], said[index] = moments.to(dtype), rest
                    bar.update()
                write_tensors(self._path("latents", number), tensors, said)
        return bool(absent)

    def _encode_texts(self, model: nn.Module, batch_size: int, samples_per_file: int, dtype: torch.dtype) -> bool:
        rule = model.ucg_training.get(model.cond_stage_key) or {}
        captions = [EMPTY, rule.get("val") or EMPTY]  # what training puts in place of dropped ones
        for path in self._paths("latents"):
            captions += [sample.get(model.cond_stage_key) for sample in read_said(path).values()]
        if not all(isinstance(caption, str) for caption in captions):
            return False
        parts = dict(chunks(list(dict.fromkeys(captions)), samples_per_file))
        absent = [number for number in parts if read_said(self._path("texts", number)) != parts[number]]
        for number in tqdm(absent, "Encoding the captions", unit="file"):
            rows = [encode_texts(model, part) for _, part in chunks(parts[number], batch_size)]
            write_tensors(self._path("texts", number), {"embeddings": torch.cat(rows).to(dtype)}, parts[number])
        return bool(absent)

    # ---- reading ----

    def stand_in(self, dataset: Any, section: Any, model: nn.Module, words: Sequence[str] = ANY_YAML) -> MomentsDataset:
        """What takes a training set's place; the model's frozen text encoder then answers from the cache.

        Args:
            words: see `command`, of the training that asks.

        Raises:
            UserError: there is no cache, it is unfinished, damaged, or of another model or other data.
        """
        manifest = self.manifest()
        command = self.command(words, manifest["layout"] if manifest else {})
        if manifest is None:
            raise UserError(f"yaml: data.params.cache_latents: no cache is in '{self.directory}'; make it: {command}")
        if not manifest["finished"]:
            raise UserError(f"the cache in {self.directory} is not finished; go on with it: {command}")
        different = manifest["origin"].difference(Origin.of(model, dataset, section))
        if different:
            raise UserError(f"the cache in {self.directory} was made {different}; anew: {command}")
        paths = self._paths("latents")
        rest: list[dict[str, Any]] = [{}] * len(dataset)
        file_of: dict[int, int] = {}
        for number, path in enumerate(paths):
            for index, sample in self._said(path, command).items():
                rest[int(index)], file_of[int(index)] = sample, number
        if set(file_of) != set(order_of(dataset)):
            raise UserError(f"the cache in {self.directory} lacks files; complete it: {command}")
        self._lend_texts(model, command)
        return MomentsDataset(dataset, rest, StoredMoments(paths, file_of))

    def _said(self, path: Path, command: str) -> Any:
        said = read_said(path)
        if said is None:
            raise UserError(f"{path} is damaged; mend it: {command}")
        return said

    def _lend_texts(self, model: nn.Module, command: str) -> None:
        paths = self._paths("texts")
        for path in paths:
            self._said(path, command)
        if paths and has_frozen_texts(model):
            encoder, name = model.cond_stage_model, model.cond_stage_forward or "encode"
            setattr(encoder, name, StoredTexts(encoder, getattr(encoder, name, encoder), paths))


@torch.no_grad()
def encode_texts(model: nn.Module, captions: Sequence[str]) -> torch.Tensor:
    """Embeddings [B, T, D] of captions, on the CPU.

    Raises:
        UserError: the model's condition is no tensor.
    """
    encoded = model.get_learned_conditioning(list(captions))
    if not isinstance(encoded, torch.Tensor):
        raise UserError(f"data: texts cannot be cached: {type(model.cond_stage_model).__name__} gives no tensor")
    return encoded.cpu()


def size_of(paths: Iterable[Path]) -> float:
    """The size of files in MiB."""
    return sum(path.stat().st_size for path in paths) / 2**20
