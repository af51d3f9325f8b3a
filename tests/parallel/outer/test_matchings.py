"""Matchings: partners agree, each pair occurs in one round, and all replicas draw the same round."""

import numpy as np
import pytest

from meshwright.parallel.outer.matchings import matching_for_round, matchings


@pytest.mark.parametrize("replicas", range(1, 10))
def test_each_replica_meets_every_other_in_exactly_one_round(replicas):
    table = matchings(replicas)
    itself = np.arange(replicas)
    assert (np.take_along_axis(table, table, axis=1) == itself).all()  # the partner's partner is the replica itself
    assert (table == itself).sum() == (replicas if replicas % 2 else 0)  # no replica is idle, or each once
    pairs = sorted((a, b) for row in table for a, b in enumerate(row) if a < b)
    assert pairs == [(a, b) for a in range(replicas) for b in range(a + 1, replicas)]


def test_every_round_is_drawn_as_often_as_the_others():
    draws = [matching_for_round(round_number, replicas=4, seed=7) for round_number in range(600)]
    assert np.bincount(draws, minlength=3) == pytest.approx([200] * 3, abs=45)
    assert draws == [matching_for_round(round_number, replicas=4, seed=7) for round_number in range(600)]
    assert draws != [matching_for_round(round_number, replicas=4, seed=8) for round_number in range(600)]
