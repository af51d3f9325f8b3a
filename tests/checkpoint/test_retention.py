"""Retention: a table of the steps that are kept."""

import pytest

from meshwright.checkpoint.retention import select_retained

STEPS = [10, 20, 30, 40, 50]
CASES = {
    "the newest": ({"keep_newest": 2}, {40, 50}),
    "at least one": ({"keep_newest": 0}, {50}),
    "periodic": ({"keep_newest": 1, "keep_every": 20}, {20, 40, 50}),
    "the best": ({"keep_newest": 1, "keep_best": 2, "scores": {10: 3.0, 20: 1.0, 30: 2.0}}, {20, 30, 50}),
    "NaN is never best": ({"keep_newest": 1, "keep_best": 2, "scores": {10: float("nan"), 20: 1.0}}, {20, 50}),
    "a tie goes to the newer": ({"keep_newest": 1, "keep_best": 1, "scores": {10: 1.0, 20: 1.0}}, {20, 50}),
    "a score of a deleted step": ({"keep_newest": 1, "keep_best": 1, "scores": {5: 0.1, 10: 1.0}}, {10, 50}),
}


@pytest.mark.parametrize(("rule", "retained"), CASES.values(), ids=CASES)
def test_retained_steps(rule, retained):
    assert select_retained(STEPS, **rule) == retained


def test_without_checkpoints_nothing_is_retained():
    assert select_retained([], keep_newest=3, keep_every=2, keep_best=1, scores={2: 1.0}) == set()
