"""Points of a study in a plane."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb

from ldm.evaluation.plot import PALETTE, draw_points


def test_markers_lie_at_the_means_and_too_much_is_shaded() -> None:
    points = {"grey": [(0.0, 0.0)], "blue": [(1.0, 0.5), (3.0, 1.5)], "red": [(9.0, 0.0)]}
    picture = np.asarray(draw_points(points, "title", "x", "y", most_x=5.0), dtype=int)
    shaded = np.nonzero((picture == [241, 243, 244]).all(-1))[1]

    def place(colour: str) -> np.ndarray:
        wanted = np.array([round(255 * part) for part in to_rgb(colour)])
        ys, xs = np.nonzero(np.abs(picture - wanted).max(-1) == 0)
        left = xs <= shaded.max()  # the names are on the right
        return np.array([np.median(xs[left]), np.median(ys[left])])

    grey, blue, red = (place(colour) for colour in PALETTE[:3])
    scale = (red[0] - grey[0]) / 9
    assert abs(blue[0] - grey[0] - 2 * scale) < 3, "the mean of 1 and 3"
    assert abs(grey[1] - red[1]) < 3 and blue[1] < grey[1] - 50
    assert abs(shaded.min() - (grey[0] + 5 * scale)) < 3
