"""Layers of each stage: against all ways to put them."""

import itertools

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.layer_balance import even, redistributed


@pytest.mark.parametrize("head_cost", [0.0, 0.7, 2.4, 6.4])
@pytest.mark.parametrize("fewest", [0, 1])
def test_no_distribution_has_a_faster_slowest_stage(head_cost, fewest):
    layers, stages, extra = 7, 3, np.array([0.3, 0, head_cost])
    everything = (way for way in itertools.product(range(layers + 1), repeat=stages)
                  if sum(way) == layers and min(way) >= fewest)  # fmt: skip
    fastest = min(max(way + extra) for way in everything)
    held = redistributed(layers, stages=stages, head_cost=head_cost, embedding_cost=0.3, fewest=fewest)
    assert held.sum() == layers and held.min() >= fewest
    assert max(held + extra) == pytest.approx(fastest)


def test_even_differs_by_one_at_most():
    assert even(8, stages=4).tolist() == [2, 2, 2, 2]
    assert even(6, stages=4).tolist() == [2, 2, 1, 1]


def test_too_few_layers_say_how_many_stages_they_make():
    with pytest.raises(UserError, match="layers: 3 do not give 4 stages 1 each; use 3 stages at most"):
        redistributed(3, stages=4, head_cost=0.0, fewest=1)
