"""Interval colouring: nobody shares a place, and there are no more places than needed."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meshwright.parallel.pipeline.tables.interval_coloring import colour

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda one: (one[0], one[0] + one[1])))


@given(INTERVALS)
def test_no_two_intervals_share_a_place_in_any_tick(intervals):
    places, _ = colour(intervals)
    taken = Counter((tick, place) for (start, end), place in zip(intervals, places, strict=True)
                    for tick in range(start, end + 1))  # fmt: skip
    assert max(taken.values(), default=1) == 1


@given(INTERVALS)
def test_as_many_places_as_are_ever_alive_at_once(intervals):
    alive = Counter(tick for start, end in intervals for tick in range(start, end + 1))
    places, count = colour(intervals)
    assert count == max(alive.values(), default=0)
    assert set(places) == set(range(count))
