"""What a personalisation leaves behind: for every level that was trained a file or folder that describes itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm.models.diffusion.ddpm_dream import level_of
from ldm.modules import lora
from ldm.util import atomic_path

Info = Mapping[str, Any]
WEIGHTS_OF = {"text": "cond_stage_model.", "unet": "model.diffusion_model."}  # what lies in a file of weights
WEIGHTS_NAME = "weights.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str], name: str, info: Info) -> dict[str, Path]:
    """Write what was trained into `folder`: `<name>-adapters`, `<name>-lora.safetensors` and so on.

    Args:
        model: a `ddpm_dream.LatentDiffusion`.
        info: what the files say of their training: base_checkpoint, class_word, steps, ...

    Returns:
        What each is called, e.g. "LoRA", and where it is. `ldm.artefacts` reads them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for level in model.train_level:
        what, ending, write = WRITERS[level]
        if what not in written:
            written[what] = folder / f"{name}-{ending}"
            write(model, written[what], info)
    return written


def metadata(info: Info, **more: Any) -> dict[str, str]:
    """The words that a .safetensors file can say of itself."""
    return {key: str(value) for key, value in {**info, **more}.items() if value not in (None, "")}


def _save_adapters(model: nn.Module, path: Path, info: Info) -> None:
    with model.evaluation_scope():
        model.model.diffusion_model.save_adapter_to_dir(path, **info)


def _save_lora(model: nn.Module, path: Path, info: Info) -> None:
    from ldm.exchange import lora as files

    config = model.lora_config
    said = metadata(info, kind="lora", rank=config.rank, alpha=config.alpha or config.rank)
    with model.evaluation_scope():
        files.write(lora.weights_in(model), model.yaml_params, path, said)


def _save_embedding(model: nn.Module, path: Path, info: Info) -> None:
    from ldm.exchange import embeddings

    manager = model.embedding_manager
    words = dict(manager.string_to_param_dict)
    begins = ", ".join(manager.initializers.get(word, "") for word in words)
    embeddings.write(words, path, metadata(info, kind="embedding", words=", ".join(words), initializer_words=begins))


def _save_weights(model: nn.Module, path: Path, info: Info) -> None:
    from ldm.weight_files import write_tensors

    prefixes = tuple(prefix for level, prefix in WEIGHTS_OF.items() if level in model.train_level)
    with model.evaluation_scope(), atomic_path(path) as temporary:
        state = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes) and level_of(k) in WEIGHTS_OF}
        write_tensors(state, temporary, "safetensors", metadata(info, kind="weights"))
    for older in path.parent.glob(f"[0-9]*-{WEIGHTS_NAME}"):  # they are large
        if older != path:
            older.unlink(missing_ok=True)


WRITERS: dict[str, tuple[str, str, Callable[[nn.Module, Path, Info], None]]] = {
    "adapter": ("Adapters", "adapters", _save_adapters),
    "lora": ("LoRA", "lora.safetensors", _save_lora),
    "embeder": ("Embedding", "embedding.safetensors", _save_embedding),
    "text": ("Weights", WEIGHTS_NAME, _save_weights),
    "unet": ("Weights", WEIGHTS_NAME, _save_weights),
}
