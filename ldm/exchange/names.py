"""Tables of names, and checks of config files, that every part of the exchange uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ldm.errors import UserError


class Names:
    """A one-to-one table between the dotted names of modules: ours, which are CompVis', and diffusers'.

    A key is renamed by the longest name in the table that it begins with, level by level.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._theirs = dict(pairs)
        self._ours = {theirs: ours for ours, theirs in self._theirs.items()}

    def theirs(self, key: str) -> str | None:
        """diffusers' name of our `key`; None when the table does not know it."""
        return _renamed(self._theirs, key)

    def ours(self, key: str) -> str | None:
        """Our name of diffusers' `key`; None when the table does not know it."""
        return _renamed(self._ours, key)


def _renamed(table: Mapping[str, str], key: str) -> str | None:
    head = key
    while head:
        if head in table:
            return table[head] + key[len(head) :]
        head = head.rpartition(".")[0]
    return None


def under(ours: str, theirs: str, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """`pairs` of names below the module that is called `ours` here and `theirs` there."""
    for a, b in pairs:
        yield f"{ours}.{a}", f"{theirs}.{b}"


def require(config: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raise UserError when an entry of a config file differs from the only value that there is code for."""
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value:
            raise UserError(
                f"{where}: {key} is {found!r}, and only {value!r} is supported: "
                "the models that are exchanged are those of Stable Diffusion v1 and v2"
            )


def multiples(widths: Iterable[int], where: str) -> list[int]:
    """A network's widths, level by level, as multiples of the first.

    Raises:
        UserError: they are none.
    """
    widths = list(widths)
    if not widths or any(width % widths[0] for width in widths):
        raise UserError(f"{where}: block_out_channels {widths} are no multiples of the first")
    return [width // widths[0] for width in widths]
