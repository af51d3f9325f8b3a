"""Pairs: partners agree, everybody meets everybody once in the rounds, and the draw is everybody's."""

import numpy as np
import pytest

from meshwright.parallel.outer.matchings import chosen, matchings


@pytest.mark.parametrize("replicas", range(1, 10))
def test_each_replica_meets_every_other_in_exactly_one_round(replicas):
    table = matchings(replicas)
    own = np.arange(replicas)
    assert (np.take_along_axis(table, table, axis=1) == own).all()  # my partner's partner is me
    assert (table == own).sum() == (replicas if replicas % 2 else 0)  # nobody is idle, or each once
    met = sorted((a, b) for row in table for a, b in enumerate(row) if a < b)
    assert met == [(a, b) for a in range(replicas) for b in range(a + 1, replicas)]


def test_every_round_is_drawn_as_often_as_the_others():
    draws = [chosen(meeting, replicas=4, seed=7) for meeting in range(600)]
    assert np.bincount(draws, minlength=3) == pytest.approx([200] * 3, abs=45)
    assert draws == [chosen(meeting, replicas=4, seed=7) for meeting in range(600)]
    assert draws != [chosen(meeting, replicas=4, seed=8) for meeting in range(600)]
