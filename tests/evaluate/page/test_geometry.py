"""Where the marks and lines of plots lie."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate.page.geometry import (
    Axis,
    Point,
    band_path,
    clipped,
    curve_path,
    on_line,
    spread,
    thinned,
    ticks,
)

numbers = st.floats(-100, 100, allow_nan=False)
DOWN = Axis(0, 1, 100, 0)


def points_of(path: str) -> list[Point]:
    pairs = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)
    return [(float(x), float(y)) for x, y in pairs]


@given(numbers, st.floats(0.1, 100), st.floats(0, 1))
def test_an_axis_places_its_ends_and_what_lies_between(
    low: float, width: float, share: float
) -> None:
    axis = Axis(low, low + width, 40, 240)
    assert axis.at(low) == 40
    assert axis.at(low + width) == 240
    assert axis.at(low + share * width) == pytest.approx(40 + 200 * share, abs=0.06)


def test_what_is_beyond_an_axis_is_put_on_its_end() -> None:
    assert [DOWN.at(-3), DOWN.at(7)] == [100, 0]
    assert [DOWN.holds(value) for value in (-0.1, 0, 0.5, 1, 1.1)] == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.5, 1, [0.5, 0.6, 0.7, 0.8, 0.9, 1]),
     (-0.25, 0.25, [-0.2, -0.1, 0, 0.1, 0.2]), (0, 0.012, [0, 0.0025, 0.005, 0.0075, 0.01])],
)  # fmt: skip
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(numbers, st.floats(1e-3, 100))
def test_ticks_lie_within_and_are_a_handful(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-6 <= tick <= low + width + 1e-6 for tick in found)


def test_a_line_passes_through_its_points() -> None:
    path = curve_path((0, 0.5, 1), (0, 0.9, 1), Axis(0, 1, 0, 200), DOWN)
    assert path == "M0 100L100 10 200 0"


def test_a_line_is_cut_where_it_is_undefined() -> None:
    path = curve_path((0, 0.25, 0.5, 0.75, 1), (0, 0.5, None, 0.5, 1), Axis(0, 1, 0, 200), DOWN)
    assert path == "M0 100L50 50M150 50L200 0"


def test_a_line_is_cut_where_it_falls_below_the_plot() -> None:
    assert clipped([(0, 1), (1, -1), (2, -3), (3, 1)], 0) == [
        [(0, 1), (0.5, 0)],
        [(2.75, 0), (3, 1)],
    ]
    assert clipped([(0, -1), (1, -2)], 0) == []


def test_a_band_goes_along_its_lower_line_and_back_along_the_upper() -> None:
    path = band_path((0, 1, 2), (0, 0.2, None), (0.5, 1, 1), Axis(0, 2, 0, 200), DOWN)
    assert path == "M0 100L100 80 100 0 0 50Z"


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40), st.floats(0.01, 5))
def test_thinning_keeps_the_ends_and_an_order(points: list[Point], tolerance: float) -> None:
    kept = thinned(points, tolerance)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    remaining = iter(points)
    assert all(point in remaining for point in kept)


def test_thinning_drops_what_lies_on_a_line_and_keeps_a_corner() -> None:
    assert thinned([(0, 0), (1, 0.01), (2, 0), (2, 1), (2, 2)], 0.1) == [(0, 0), (2, 0), (2, 2)]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_spread_labels_keep_their_distance_and_their_order(places: list[float]) -> None:
    moved = spread(places, 10, 0, 100)
    assert all(0 <= place <= 100 for place in moved)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for above, below in itertools.pairwise(order):
        assert moved[below] - moved[above] >= 10 - 0.11


def test_labels_that_are_apart_stay_where_they_are() -> None:
    assert spread([80, 10, 40], 14, 0, 100) == [80, 10, 40]


def test_a_letter_stands_at_its_share_of_a_line() -> None:
    assert on_line((0, 0, 30), (0, 10, 10), 0.5) == (10, 10)
    assert on_line((0, 1), (None, 5), 0.3) == (1, 5)
    assert on_line((0, 1), (None, None), 0.3) is None
