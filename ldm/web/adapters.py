"""Adapters on the page: which there are, and putting them into a model that stays loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError

SET = "page-{}"  # names of the sets in which the page's adapters are


@dataclass(frozen=True)
class Shelf:
    """The adapters that people can choose by name: those that were trained here, and those of other folders.

    Args:
        own: the folder in which adapters that were trained here lie, each a directory.
        others: adapter directories, LoRA files, or folders of them.
    """

    own: Path
    others: tuple[Path, ...] = ()

    def all(self) -> dict[str, Path]:
        """Name -> directory or file, those trained here first and the newest of them at the beginning."""
        found: dict[str, Path] = {}
        for path in sorted(self._in(self.own), key=lambda p: p.stat().st_mtime, reverse=True):
            found[path.name] = path
        for folder in self.others:
            for path in sorted(self._in(folder)):
                name, again = path.name, 2
                while name in found:
                    name, again = f"{path.name} ({again})", again + 1
                found[name] = path
        return found

    def find(self, name: str) -> Path:
        """Raises UserError where there is none of that name (any more)."""
        if name not in (known := self.all()):
            raise UserError(f"adapter '{name}': it is not here any more; choose another")
        return known[name]

    @staticmethod
    def _in(place: Path) -> list[Path]:
        if is_adapter(place):
            return [place]
        return [path for path in place.iterdir() if is_adapter(path)] if place.is_dir() else []


def is_adapter(path: Path) -> bool:
    """Whether that is an adapter directory or a LoRA file, by its name and what lies in it."""
    return path.suffix == ".safetensors" if path.is_file() else next(path.glob("*.pt"), None) is not None


@dataclass
class Wardrobe:
    """Puts adapters into a model and takes them out again: then it is what it was, to the bit.

    Args:
        unet_params: the yaml's `unet_config.params`, for the names of LoRA files.
    """

    model: Any
    unet_params: Mapping[str, Any]
    worn: dict[Path, float] = field(default_factory=dict)
    _base: dict[str, Any] = field(default_factory=dict)  # weights that LoRA has changed, as they were

    def wear(self, chosen: Mapping[str, tuple[Path, float]]) -> None:
        """Have the model wear these and no others: name -> (directory or file, weight).

        Raises:
            UserError: one cannot be read, or is of another model; the model then wears none.
        """
        wanted = {path: weight for path, weight in chosen.values() if weight}
        if wanted != self.worn:
            self.take_off()
            try:
                for place, (path, weight) in enumerate(wanted.items()):
                    self._put_on(path, weight, SET.format(place))
            except BaseException:
                self.take_off()
                raise
            self.worn = wanted
        said = [f"{name} ({weight:g})" for name, (_, weight) in chosen.items() if weight]
        self.model.origin = {**getattr(self.model, "origin", {}), "adapter": ", ".join(said)}

    def take_off(self) -> None:
        """Take all of them out."""
        from ldm.modules import adapters

        unet = self.model.model.diffusion_model
        for adapter_set in {a.adapter_set for a in adapters.find(unet).values()}:
            if adapter_set.startswith(SET.format("")):
                adapters.eject(unet, adapter_set)
        for name, weight in self._base.items():
            unet.get_parameter(name).data = weight
        self._base, self.worn = {}, {}

    def _put_on(self, path: Path, weight: float, adapter_set: str) -> None:
        from ldm.exchange import lora as lora_files
        from ldm.modules import adapter_files, adapters, lora

        unet = self.model.model.diffusion_model
        if path.is_dir():
            adapter_files.load(unet, path, adapter_set)
            adapters.set_scale(unet, weight, adapter_set)
            return
        weights = lora_files.read(path, self.unet_params)
        lora.check_layers(weights, {name: value.shape for name, value in unet.state_dict().items()}, str(path))
        for layer in lora.layers_of(weights):
            parameter = unet.get_parameter(f"{layer}.weight")
            self._base.setdefault(f"{layer}.weight", parameter.data)
            own = {layer + end: weights[layer + end].to(parameter.device) for end in (lora.DOWN, lora.UP)}
            parameter.data = lora.merged(parameter.data, own, layer, weight).to(parameter.dtype)
