"""Layers of each stage, against all distributions there are."""

import itertools

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.layer_balance import even_layers, redistribute_layers


@pytest.mark.parametrize("head_cost", [0.0, 0.7, 2.4, 6.4])
@pytest.mark.parametrize("min_layers", [0, 1])
def test_no_distribution_has_a_faster_slowest_stage(head_cost, min_layers):
    layers, stages, extra = 7, 3, np.array([0.3, 0, head_cost])
    distributions = (counts for counts in itertools.product(range(layers + 1), repeat=stages)
                  if sum(counts) == layers and min(counts) >= min_layers)  # fmt: skip
    fastest = min(max(counts + extra) for counts in distributions)
    result = redistribute_layers(layers, stages=stages, head_cost=head_cost, embedding_cost=0.3, min_layers=min_layers)
    assert result.sum() == layers and result.min() >= min_layers
    assert max(result + extra) == pytest.approx(fastest)


def test_even_layers_differ_by_at_most_one():
    assert even_layers(8, stages=4).tolist() == [2, 2, 2, 2]
    assert even_layers(6, stages=4).tolist() == [2, 2, 1, 1]


def test_too_few_layers_are_refused_with_the_number_of_stages_that_fits():
    with pytest.raises(UserError, match=r"layers: 3 layers, .*4 stages .*at most 3 stages"):
        redistribute_layers(3, stages=4, head_cost=0.0, min_layers=1)
