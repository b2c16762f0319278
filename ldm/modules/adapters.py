"""Adapters: small trainable modules put at named positions of a U-Net (Xiang et al., 2023, arXiv:2303.18181).

Three separate things: what the yaml says (`AdapterSpec`), the tensor code (`TransformerAdapter`,
`ResidualAdapter`), and who gets one (`inject`). A block only announces its positions (`AdaptableBlock`); all
that happens there is here.

In a transformer block with input x and context c the positions are, in the order in which they are formed,
    attn1i = x, attn1o = SA(norm1(attn1i)), attn2i = attn1o + attn1i,
    attn2c = c, attn2o = CA(norm2(attn2i), attn2c),
    ffni = attn2o + attn2i, ffno = FF(norm3(ffni)), transo = ffno + ffni,
and in a residual block resi, its input, and reso, its output. An adapter reads the value at `din` before any
adapter adds to it, and adds `scale * adapter(value)` to the value at `dout` at the moment that value is
formed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.diffusionmodules.util import normalization, zero_module

DEFAULT_SET = "default"

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "default": nn.ReLU,
    "relu": nn.ReLU,
    "sig": nn.Sigmoid,
    "silu": nn.SiLU,
    "ident": nn.Identity,
}


@dataclass(frozen=True)
class Family:
    """The adapters of one kind of block: where their yaml is, and which positions they may use."""

    key: str  # in adapter_config
    module_name: str  # of the first adapter in a block
    order: tuple[str, ...]  # of the positions, as they are formed
    outputs: tuple[str, ...]  # the positions that dout may be

    def outputs_for(self, din: str) -> tuple[str, ...]:
        """Where an adapter that reads `din` may add: not before it; the context is a world of its own."""
        if din == "attn2c":
            return (din,)
        first = self.order.index(din)
        return tuple(p for p in self.outputs if p != "attn2c" and self.order.index(p) >= first)


FAMILIES = (
    Family(
        "transformer_adp_config",
        "adapter_inout",
        ("attn1i", "attn1o", "attn2i", "attn2c", "attn2o", "ffni", "ffno", "transo"),
        ("attn1i", "attn2i", "attn2c", "ffni", "transo"),
    ),
    Family("resblock_adp_config", "adapter", ("resi", "reso"), ("resi", "reso")),
)


@dataclass(frozen=True)
class AdapterSpec:
    """One entry of `adapter_config`: what is put into every block that has its positions."""

    family: Family
    din: str
    dout: str
    mid_dim: int
    method: str = "default"  # the activation, a key of ACTIVATIONS
    scale: float = 1.0
    init: str = "zero"  # "zero": starts as the identity; "default": the last layer starts as PyTorch makes it
    type: str = "inout"

    KEYS: ClassVar = ("type", "din", "dout", "mid_dim", "method", "scale", "init")

    @classmethod
    def parse(cls, family: Family, entry: Any, where: str) -> AdapterSpec:
        """The checked form of a yaml entry; `where` is its key, for messages.

        Raises:
            UserError: a key is missing or unknown, or holds what it may not hold.
        """
        if not isinstance(entry, Mapping):
            raise UserError(f"{where} holds {entry!r}; it must be a mapping with din, dout and mid_dim")
        for key in entry:
            if key not in cls.KEYS:
                raise UserError(f"{where}.{key} is unknown; the keys are {', '.join(cls.KEYS)}")
        for key in ("din", "dout", "mid_dim"):
            if entry.get(key) is None:
                raise UserError(f"{where}.{key} is missing; an adapter needs din, dout and mid_dim")
        values = {key: value for key, value in entry.items() if value is not None}
        mid_dim, scale = values["mid_dim"], values.get("scale", 1.0)
        if type(mid_dim) is not int or mid_dim < 1:
            raise UserError(f"{where}.mid_dim holds {mid_dim!r}; it must be a whole number of at least 1")
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise UserError(f"{where}.scale holds {scale!r}; it must be a finite number such as 1.0")
        choices = {
            "type": ("inout",),
            "din": family.order,
            "method": tuple(ACTIVATIONS),
            "init": ("zero", "default"),
        }
        for key in choices:
            if key in values and values[key] not in choices[key]:
                allowed = ", ".join(choices[key])
                raise UserError(f"{where}.{key} holds {values[key]!r}; it must be one of {allowed}")
        if values["dout"] not in family.outputs_for(values["din"]):
            allowed = ", ".join(family.outputs_for(values["din"]))
            raise UserError(
                f"{where}.dout holds {values['dout']!r}; with din {values['din']} it must be one of {allowed}"
            )
        return cls(family, **values)

    def to_config(self) -> dict[str, Any]:
        """The yaml entry that gives this."""
        return {key: getattr(self, key) for key in self.KEYS}


def parse_config(config: Mapping[str, Any] | DictConfig | None) -> list[AdapterSpec]:
    """The adapters that an `adapter_config` section describes; each of its keys holds one entry or a list.

    Raises:
        UserError: the section is empty or wrong; the message names the key, what it holds and what it may.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    keys = ", ".join(family.key for family in FAMILIES)
    if not isinstance(config, Mapping) or not any(config.values()):
        raise UserError(f"adapter_config holds {config!r}; it must hold {keys} or both")
    for key in config:
        if key not in {family.key for family in FAMILIES}:
            raise UserError(f"adapter_config.{key} is unknown; the keys are {keys}")
    specs = []
    for family in FAMILIES:
        entries = config.get(family.key) or []
        if isinstance(entries, (list, tuple)):
            named = [(f"adapter_config.{family.key}[{i}]", entry) for i, entry in enumerate(entries)]
        else:
            named = [(f"adapter_config.{family.key}", entries)]
        specs += [AdapterSpec.parse(family, entry, where) for where, entry in named]
    return specs


def render_config(specs: list[AdapterSpec]) -> dict[str, list[dict[str, Any]]]:
    """The `adapter_config` section that `parse_config` reads back as `specs`."""
    sections = {f.key: [spec.to_config() for spec in specs if spec.family == f] for f in FAMILIES}
    return {key: entries for key, entries in sections.items() if entries}


class Adapter(nn.Module):
    """Base of the adapters' layers: the value at `spec.din` -> what is added at `spec.dout`."""

    spec: AdapterSpec
    adapter_set: str
    number: int  # among the adapters of its family in its set
    strength: float = 1.0
    enabled: bool = True

    @property
    def weight_of_output(self) -> float:
        """What its output is multiplied by before it is added."""
        return self.spec.scale * self.strength

    @property
    def file_stem(self) -> str:
        """How its file is named, after its block's name: like its module when its set is the only one."""
        return _numbered(self.spec.family.module_name, self.number)


class TransformerAdapter(Adapter):
    """Linear(dim, mid) -> activation -> Linear(mid, dim): [B, N, dim] -> [B, N, dim]."""

    def __init__(self, spec: AdapterSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.adp = nn.Sequential(
            nn.Linear(width_in, spec.mid_dim), ACTIVATIONS[spec.method](), nn.Linear(spec.mid_dim, width_out)
        )
        if spec.init == "zero":
            zero_module(self.adp[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.adp(x)


class ResidualAdapter(Adapter, nn.Sequential):
    """GroupNorm -> SiLU -> Conv3x3 -> activation -> Conv3x3: [B, width_in, H, W] -> [B, width_out, H, W]."""

    def __init__(self, spec: AdapterSpec, width_in: int, width_out: int) -> None:
        nn.Sequential.__init__(
            self,
            normalization(width_in),
            nn.SiLU(),
            nn.Conv2d(width_in, spec.mid_dim, 3, padding=1),
            ACTIVATIONS[spec.method](),
            nn.Conv2d(spec.mid_dim, width_out, 3, padding=1),
        )
        self.spec = spec
        if spec.init == "zero":
            zero_module(self[4])


LAYERS: dict[str, type[Adapter]] = {"adapter_inout": TransformerAdapter, "adapter": ResidualAdapter}


def _unchanged(position: str, value: Any) -> Any:
    return value


class _Visit:
    """One pass through one block: remembers the values that adapters read until they add to a later one."""

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters
        self.read_later = {adapter.spec.din for adapter in adapters}
        self.values: dict[str, Tensor] = {}

    def __call__(self, position: str, value: Tensor) -> Tensor:
        if position in self.read_later:
            self.values[position] = value
        for adapter in self.adapters:
            if adapter.spec.dout == position:
                delta = adapter(self.values[adapter.spec.din])
                value = torch.add(value, delta, alpha=adapter.weight_of_output)
        return value


class AdaptableBlock(nn.Module):
    """A block that announces named positions, so that adapters can be put there.

    `positions` are their names (none: the block takes no adapters) and `widths` their channels. The forward
    pass calls `at = self.announcer()` once, then `value = at(name, value)` at each position as its value is
    formed.
    """

    positions: tuple[str, ...] = ()
    widths: Mapping[str, int | None]
    active_adapters: tuple[Adapter, ...] = ()

    def announcer(self) -> Callable[[str, Any], Any]:
        """(position, value) -> the value that the block goes on with; for one forward pass."""
        return _Visit(self.active_adapters) if self.active_adapters else _unchanged

    def refresh_adapters(self) -> None:
        """To be called after an adapter of the block has come, gone, or been switched."""
        self.active_adapters = tuple(m for m in self.children() if isinstance(m, Adapter) and m.enabled)


def inject(unet: nn.Module, config: Mapping[str, Any] | DictConfig, adapter_set: str = DEFAULT_SET) -> None:
    """Put the adapters that `config`, an `adapter_config` section, describes into the blocks that take them.

    They take the device and dtype of their block. Whether the rest of the network is trained is left as it
    is. Several sets may be in place at once: each has a name, with which it is scaled, saved and ejected.
    Nothing is changed when an error is raised.

    Raises:
        UserError: the config is wrong, the network has no such position, or the set is already in place.
    """
    specs = parse_config(config)
    if find(unet, adapter_set):
        raise UserError(f"the adapter set '{adapter_set}' is already injected; eject it first or use another name")
    blocks = [m for m in unet.modules() if isinstance(m, AdaptableBlock)]
    made = []
    for i, spec in enumerate(specs):
        takers = [block for block in blocks if spec.din in block.positions]
        if not takers or any(block.widths[spec.din] is None for block in takers):
            raise UserError(f"adapter_config.{spec.family.key}: din '{spec.din}' does not exist in this U-Net")
        nth = sum(earlier.family == spec.family for earlier in specs[:i])
        for block in takers:
            adapter = LAYERS[spec.family.module_name](spec, block.widths[spec.din], block.widths[spec.dout])
            adapter.adapter_set = adapter_set
            adapter.number = nth
            made.append((block, adapter))
    for block, adapter in made:
        like = next(block.parameters())
        adapter.to(device=like.device, dtype=like.dtype)
        stem, number = adapter.spec.family.module_name, 0
        while hasattr(block, _numbered(stem, number)):
            number += 1
        block.add_module(_numbered(stem, number), adapter)
        block.refresh_adapters()


def _numbered(stem: str, number: int) -> str:
    return f"{stem}_{number}" if number else stem


def eject(unet: nn.Module, adapter_set: str | None = None) -> None:
    """Take out the adapters of one set, or all; what is left computes exactly what it did before."""
    for block in unet.modules():
        if isinstance(block, AdaptableBlock):
            for name, module in list(block.named_children()):
                if isinstance(module, Adapter) and adapter_set in (None, module.adapter_set):
                    delattr(block, name)
            block.refresh_adapters()


def enable(unet: nn.Module, enabled: bool = True, adapter_set: str | None = None) -> None:
    """Switch the adapters of one set, or all, on or off."""
    for adapter in find(unet, adapter_set).values():
        adapter.enabled = enabled
    for block in unet.modules():
        if isinstance(block, AdaptableBlock):
            block.refresh_adapters()


def set_scale(unet: nn.Module, scale: float, adapter_set: str | None = None) -> None:
    """Multiply what the adapters of one set, or all, add by `scale`: 1 is as trained, 0 is the base model."""
    for adapter in find(unet, adapter_set).values():
        adapter.strength = float(scale)


def find(unet: nn.Module, adapter_set: str | None = None) -> dict[str, Adapter]:
    """Module name -> adapter, of one set or of all."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Adapter) and adapter_set in (None, module.adapter_set)
    }


def adapter_parameters(unet: nn.Module, adapter_set: str | None = None) -> Iterator[nn.Parameter]:
    """The parameters of the adapters of one set, or of all."""
    for adapter in find(unet, adapter_set).values():
        yield from adapter.parameters()


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key belongs to an adapter: no checkpoint of a base model has those."""
    return re.search(r"(^|\.)adapter(_inout)?(_\d+)?\.", key) is not None
