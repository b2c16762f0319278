"""Which personalisation is best: the law, on made-up scores."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ldm.evaluation.ranking import best_of, ranked


@dataclass(frozen=True)
class One:
    name: str
    similarity: float
    drift: float


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ([One("a", 0.7, 1.0), One("b", 0.9, 4.0), One("c", 0.8, -2.0)], "bca"),  # all drift little
        ([One("a", 0.99, 5.1), One("b", 0.5, 5.0), One("c", 1.0, 30.0)], "bac"),  # too much is behind, least first
        ([One("a", 0.9, 9.0), One("b", 0.8, 8.0)], "ba"),  # none drifts little
        ([One("a", 0.8, 2.0), One("b", 0.8, 0.0)], "ab"),  # equals as they came
    ],
)
def test_the_most_similar_of_those_that_drift_little_comes_first(scores: list[One], order: str) -> None:
    assert "".join(one.name for one in ranked(scores, 5.0)) == order
    assert best_of(scores, 5.0).name == order[0]
