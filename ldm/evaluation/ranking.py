"""Which of several personalisations is best: similarity counts, as long as other prompts have drifted little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Scored(Protocol):
    """What has a similarity, the more the better, and a drift, 0 being none."""

    @property
    def similarity(self) -> float: ...

    @property
    def drift(self) -> float: ...


T = TypeVar("T", bound=Scored)


def ranked(scores: Sequence[T], most_drift: float) -> list[T]:
    """The most similar first of those that drift at most so much; then the others, that which drifts least first.

    Equals stay in their order.
    """

    def place(score: T) -> tuple[bool, float]:
        much = score.drift > most_drift + 1e-9
        return much, score.drift if much else -score.similarity

    return sorted(scores, key=place)


def best_of(scores: Sequence[T], most_drift: float) -> T:
    """The first of `ranked`."""
    return ranked(scores, most_drift)[0]
