"""Retention: a table of what survives."""

import pytest

from meshwright.checkpoint.retention import select_retained

STEPS = [10, 20, 30, 40, 50]
CASES = {
    "newest": ({"newest": 2}, {40, 50}),
    "the newest always": ({"newest": 0}, {50}),
    "every": ({"newest": 1, "every": 20}, {20, 40, 50}),
    "best": ({"newest": 1, "best": 2, "scores": {10: 3.0, 20: 1.0, 30: 2.0}}, {20, 30, 50}),
    "not a number is never best": ({"newest": 1, "best": 2, "scores": {10: float("nan"), 20: 1.0}}, {20, 50}),
    "a tie goes to the newer": ({"newest": 1, "best": 1, "scores": {10: 1.0, 20: 1.0}}, {20, 50}),
    "a score of a step that is gone": ({"newest": 1, "best": 1, "scores": {5: 0.1, 10: 1.0}}, {10, 50}),
}


@pytest.mark.parametrize(("asked", "kept"), CASES.values(), ids=CASES)
def test_what_survives(asked, kept):
    assert select_retained(STEPS, **asked) == kept


def test_nothing_of_nothing():
    assert select_retained([], keep_newest=3, keep_every=2, keep_best=1, scores={2: 1.0}) == set()
