"""Mixtures: exact counts in every block, and each source in its own order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.configs.errors import UserError
from meshwright.train.data.mixture import BLOCK, Mixture, block_counts


class NumberedRows:
    """Row `index` has its source and its number there."""

    def __init__(self, source):
        self.source = source

    def row(self, index):
        return {"from": (self.source, index)}

    def rows_per_epoch(self, epoch=0):
        return 10


def mixture(*weights, seed=0):
    return Mixture([NumberedRows(source) for source in range(len(weights))], weights=weights, key=(seed, 0))


@pytest.mark.parametrize("block", [0, 3])
def test_every_block_has_the_exact_number_of_rows_of_each_source(block):
    mixed = mixture(1, 2, 5)
    counts = Counter(mixed.locate(index)[0] for index in range(block * BLOCK, (block + 1) * BLOCK))
    assert counts == {0: BLOCK // 8, 1: BLOCK // 4, 2: 5 * BLOCK // 8}


def test_each_source_is_read_from_its_beginning_without_a_gap():
    mixed = mixture(1, 2.5)
    rows = [mixed.row(index)["from"] for index in range(BLOCK + 300)]
    for source in (0, 1):
        within = [index for where, index in rows if where == source]
        assert within == list(range(len(within)))


def test_blocks_and_seeds_are_shuffled_differently():
    def sources(mixed, start):
        return [mixed.locate(start + index)[0] for index in range(200)]

    assert sources(mixture(1, 1), 0) == sources(mixture(1, 1), 0)
    assert sources(mixture(1, 1), 0) != sources(mixture(1, 1), BLOCK)
    assert sources(mixture(1, 1), 0) != sources(mixture(1, 1, seed=1), 0)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_counts_are_within_one_row_of_the_weights(weights):
    counts = block_counts(weights, block=1 << 20)
    assert counts.sum() == 1 << 20
    assert np.abs(counts - np.array(weights) / sum(weights) * (1 << 20)).max() < 1


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(UserError, match=r"data\.mixture\.1\.weight: 1e-05 is less than 1/2048"):
        mixture(1, 1e-5)
