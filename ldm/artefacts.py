"""What a personalisation left behind, put into a model and taken out of it again: any kind, several at once.

    from ldm import artefacts
    artefacts.use(model, {"toy-lora.safetensors": 0.8, "logs/RUN/checkpoints/240-adapters": 0.5})
    artefacts.use(model, {})  # the model as it was, to the bit

The kinds, told by what a file or folder holds: adapters (a directory), LoRA (diffusers' or kohya's), embeddings
(textual inversion, any program's), and weights of the U-Net or the text encoder as this project's trainer leaves them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.errors import UserError
from ldm.exchange import embeddings
from ldm.exchange import lora as lora_files
from ldm.modules import adapters, lora
from ldm.modules.embedding_manager import EmbeddingManager

Path_ = str | os.PathLike[str]
PARTS = ("model.diffusion_model.", "cond_stage_model.")  # what a file of weights may hold
IN_WEIGHTS = ("lora", "weights")  # the kinds that are sums with a model's weights
NOT_IN_WEIGHTS = {
    "adapters": "holds adapters, which are layers of their own, not linear in what they read: no weights are the same",
    "embedding": "is a new word for the text encoder, and no change of its weights",
}
LORA_WORDS = ("lora_A", "lora_B", "lora.down", "lora.up", "lora_down", "lora_up", "_lora.", "lora_linear_layer")


@dataclass(frozen=True)
class Found:
    """What an artefact is, told without a model.

    Args:
        kind: adapters, lora, embedding or weights.
        said: what it says of its training: base_checkpoint, class_word, trigger, steps, rank, ...
        words: new words of an embedding.
    """

    path: str
    kind: str
    said: Mapping[str, Any]
    words: tuple[str, ...] = ()

    @property
    def trigger(self) -> str:
        """What a prompt calls the subject, as far as it is known."""
        return str(self.said.get("trigger") or ", ".join(self.words))


def look(path: Path_) -> Found:
    """What lies at `path`; nothing in it is run.

    Raises:
        UserError: there is nothing, it cannot be read, or it is no artefact of a personalisation.
    """
    from ldm.modules.adapter_files import read_manifest
    from ldm.weight_files import read_content

    path = os.fspath(path)
    if not Path(path).exists():
        raise UserError(f"--adapter: there is no file or directory '{path}'")
    if Path(path).is_dir():
        manifest = read_manifest(path) or {}
        return Found(path, "adapters", {**manifest.get("trained_on", {}), **{k: manifest[k] for k in manifest}})
    content = read_content(path)
    said = lora_files.read_metadata(path)
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, Mapping) else []
    if any(word in key for key in keys for word in LORA_WORDS):
        return Found(path, "lora", said)
    if keys and all(key.startswith(PARTS) for key in keys):
        return Found(path, "weights", said)
    words = embeddings.words_in(content, Path(path).stem)
    if words:
        return Found(path, "embedding", said, tuple(words))
    raise UserError(
        f"--adapter: '{path}' is no adapter directory, LoRA, embedding, or weights of a personalisation; "
        "a whole model is named with --ckpt"
    )


def use(model: nn.Module, wanted: Mapping[Path_, float]) -> list[Found]:
    """Make `wanted`, paths with their strengths, the artefacts that `model` draws with, and no others.

    A strength of 1 is as trained, 0 is as without. Those of LoRA and weights may be any number, and add up. Nothing is
    changed when an error is raised.

    Raises:
        UserError: one cannot be read, does not fit the model (its keys are listed), or has no such strength.
    """
    if not hasattr(model, "artefacts"):
        model.artefacts = Artefacts(model)
    return model.artefacts.use(wanted)


class Artefacts:
    """The artefacts that one model draws with.

    LoRA and weights are added into the model's weights, whose originals are kept; adapters are modules beside them;
    words are looked up before the text encoder's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.originals: dict[str, torch.Tensor] = {}
        self.strengths: dict[str, float] = {}
        self.found: dict[str, Found] = {}
        self.sets: list[str] = []
        self.words: EmbeddingManager | None = None
        self.beside = getattr(model, "origin", {}).get("adapter", "")  # what --adapter_path put in

    def use(self, wanted: Mapping[Path_, float]) -> list[Found]:
        """See `ldm.artefacts.use`."""
        strengths = {os.fspath(path): float(strength) for path, strength in wanted.items()}
        if strengths == self.strengths:
            return list(self.found.values())
        before = self.strengths, self.found
        found = {path: look(path) for path in strengths}
        try:
            self._put(strengths, found)
        except BaseException:  # a full memory or disk and Ctrl+C, too
            self._put(*before)
            raise
        return list(found.values())

    @torch.no_grad()
    def _put(self, strengths: Mapping[str, float], found: Mapping[str, Found]) -> None:
        """Take everything out, and put these in; none is in where that fails."""
        self._take_out()
        try:
            self._put_in(strengths, found)
        except BaseException:
            self._take_out()
            raise
        self.strengths, self.found = dict(strengths), dict(found)
        getattr(self.model, "contexts", {}).clear()
        told = [self.beside, *(f"{path} ({strength:g})" for path, strength in strengths.items())]
        self.model.origin = {**getattr(self.model, "origin", {}), "adapter": ", ".join(filter(None, told))}

    def _put_in(self, strengths: Mapping[str, float], found: Mapping[str, Found]) -> None:
        parameters = self._parameters()
        for number, (path, one) in enumerate(found.items()):
            if one.kind == "adapters":
                self._put_adapters(path, f"artefact-{number}", strengths[path])
            elif one.kind == "embedding":
                self._put_words(path, strengths[path], one.said)
        added = {path: strength for path, strength in strengths.items() if found[path].kind in IN_WEIGHTS}
        state = {key: parameter.data for key, parameter in parameters.items()}
        changed = changed_weights(state, names_of(self.model), added) if added else {}
        for key, value in changed.items():
            parameter = parameters[key]
            self.originals[key] = parameter.data
            parameter.data = value.to(parameter.device, parameter.dtype)

    def _take_out(self) -> None:
        parameters = self._parameters()
        for key, value in self.originals.items():
            parameters[key].data = value.to(parameters[key].device, parameters[key].dtype)
        for name in self.sets:
            adapters.eject(self.model.model.diffusion_model, name)
        if self.words is not None:
            self.words.remove_all()
        self.originals, self.sets, self.strengths, self.found = {}, [], {}, {}

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The weights of U-Net and text encoder under the names that checkpoints have."""
        state = self.model.state_dict(keep_vars=True)
        return {k: v for k, v in state.items() if k.startswith(PARTS) and isinstance(v, nn.Parameter)}

    def _put_adapters(self, path: str, name: str, strength: float) -> None:
        from ldm.modules import adapter_files

        unet = self.model.model.diffusion_model
        self.sets.append(name)
        adapter_files.load(unet, path, name)
        adapters.set_scale(unet, strength, name)
        for parameter in adapters.adapter_parameters(unet, name):
            parameter.requires_grad_(False)

    def _put_words(self, path: str, strength: float, said: Mapping[str, str]) -> None:
        """A strength is how far from what its initialiser means a word is; 1 is as trained."""
        if self.words is None:
            self.words = EmbeddingManager(self.model.cond_stage_model, ())
        begins = said.get("initializer_words", "").split(", ")
        for i, (word, vectors) in enumerate(embeddings.read(path).items()):
            if strength != 1:
                start = begins[i] if i < len(begins) else ""
                if not start:
                    raise UserError(
                        f"--adapter {path}:{strength:g}: this embedding does not say what it started as, so that its "
                        "strength must be 1; weigh its word in the prompt instead: (word:0.8) with --prompt_weighting"
                    )
                vectors = torch.lerp(self.words.start_of(start, len(vectors)).cpu().float(), vectors, strength)
            self.words.add(word, vectors)


def changed_weights(
    state: Mapping[str, torch.Tensor], params: Mapping[str, Any], wanted: Mapping[Path_, float]
) -> dict[str, torch.Tensor]:
    """The weights of a model, with their keys, that LoRA and files of weights change: with them, mostly in float32.

    Args:
        state: the model's weights. params: its yaml's `model.params`. wanted: paths and strengths, 1 as trained.

    Raises:
        UserError: one is not of this model, or is of a kind that is no sum with weights.
    """
    changed: dict[str, torch.Tensor] = {}
    shapes = {key: value.shape for key, value in state.items()}
    for path, strength in wanted.items():
        kind = look(path).kind
        if kind not in IN_WEIGHTS:
            raise UserError(f"--adapter: '{path}' {NOT_IN_WEIGHTS[kind]}; keep it beside the checkpoint, for --adapter")
        if kind == "lora":
            weights = lora_files.read(path, params, shapes)
            for layer in lora.layers_of(weights):
                key = f"{layer}.weight"
                changed[key] = lora.merged(changed.get(key, state[key]), weights, layer, strength)
        else:
            for key, value in _read_weights(path, shapes).items():
                if strength == 1 and key not in changed:
                    changed[key] = value
                    continue
                now, base = changed.get(key, state[key]).float(), state[key].float()
                changed[key] = now + strength * (value.float().to(now.device) - base)
    return changed


def _read_weights(path: Path_, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    from ldm.checkpoint import check_numbers
    from ldm.weight_files import read_state_dict

    state = read_state_dict(path)
    wrong = [key for key, value in state.items() if shapes.get(key) != value.shape]
    if wrong:
        raise UserError(f"weights '{path}' are not of this model: {lora.summary(wrong)}")
    check_numbers(state, os.fspath(path))
    return state


def names_of(model: nn.Module) -> Mapping[str, Any]:
    """The yaml of a loaded model, as far as the names of its layers depend on it.

    Raises:
        UserError: nothing is known of it: it was not made by `load_model`.
    """
    params = getattr(model, "yaml_params", None)
    if params is None:
        raise UserError("LoRA: this model was not loaded by ldm.inference.load_model, so its layers' names are unknown")
    return params
