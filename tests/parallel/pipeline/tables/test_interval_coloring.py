"""Interval coloring: no two values share a slot, and there are no more slots than needed."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meshwright.parallel.pipeline.tables.interval_coloring import color_intervals

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(INTERVALS)
def test_no_two_intervals_share_a_slot_in_any_tick(intervals):
    slots, _ = color_intervals(intervals)
    users = Counter((tick, slot) for (start, end), slot in zip(intervals, slots, strict=True)
                    for tick in range(start, end + 1))  # fmt: skip
    assert max(users.values(), default=1) == 1


@given(INTERVALS)
def test_as_many_slots_as_values_are_ever_alive_at_once(intervals):
    alive = Counter(tick for start, end in intervals for tick in range(start, end + 1))
    slots, count = color_intervals(intervals)
    assert count == max(alive.values(), default=0)
    assert set(slots) == set(range(count))
