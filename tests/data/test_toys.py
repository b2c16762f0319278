import numpy as np
import pytest

from ldm.data.shapes import BACKGROUNDS, COLOURS, WORLD
from ldm.data.toys import BODIES, MARKS, UNSEEN, box, paint, random_toy

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def toys(count: int, background: str = "white") -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    return [random_toy(rng, COLOURS, BACKGROUNDS[background]) for _ in range(count)]


def test_toys_are_what_their_words_say_and_lie_inside_the_picture() -> None:
    for picture, words in toys(100):
        body, first, *_, second, mark = words.split()
        assert body in BODIES and mark in MARKS and first != second
        colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        shares = {
            tuple(colour): count / counts.sum() for colour, count in zip(colours.astype(int), counts, strict=True)
        }
        assert min(shares[COLOURS[first]], shares[COLOURS[second]]) > 0.01, words
        rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (rim == BACKGROUNDS["white"]).all()


def test_training_never_shows_the_toy_that_is_left_for_tuning() -> None:
    body, first, second, mark = UNSEEN
    seen = {words for _, words in toys(5000)}
    assert f"{body} {first} toy with an {second} {mark}" not in seen
    assert f"{body} {second} toy with a {first} {mark}" in seen


@pytest.mark.parametrize("inside, expected", [(False, 0.5), (True, 0.25)])
def test_parts_are_painted_in_order_on_the_body_alone_if_asked(inside: bool, expected: float) -> None:
    parts = [(box(-0.5, -0.5, 0.5, 0.5), RED), (box(-0.5, -1.0, 0.5, 0.0), BLUE)]
    picture = np.asarray(paint(parts, WHITE, diameter=WORLD, inside=inside))
    assert (picture == BLUE).all(axis=-1).mean() == pytest.approx(expected / 2, abs=0.03)
    assert tuple(picture[WORLD // 2 - 4, WORLD // 2]) == BLUE and tuple(picture[WORLD // 2 + 4, WORLD // 2]) == RED


def test_a_turn_is_clockwise() -> None:
    picture = np.asarray(paint([(box(-1, -0.2, 0, 0.2), RED)], WHITE, diameter=40, angle=90))
    assert tuple(picture[WORLD // 2 - 10, WORLD // 2]) == RED and tuple(picture[WORLD // 2 + 10, WORLD // 2]) == WHITE
