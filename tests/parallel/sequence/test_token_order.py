"""Orders of a row: each token once, equal work in zigzag order, and a way back."""

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.names import BATCH_FIELDS
from meshwright.parallel.sequence.token_order import ORDER_OF, contiguous, inverse, reordered, zigzag


@pytest.mark.parametrize("ordered", set(ORDER_OF.values()))
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_token_stands_once_and_the_inverse_brings_it_back(ordered, ranks):
    order = ordered(32, ranks=ranks)
    assert sorted(order) == list(range(32))
    np.testing.assert_array_equal(np.arange(32)[order][inverse(order)], np.arange(32))


def test_zigzag_gives_every_device_the_same_causal_work():
    work = [(part + 1).sum() for part in zigzag(64, ranks=4).reshape(4, -1)]
    assert len(set(work)) == 1
    assert len({(part + 1).sum() for part in contiguous(64, ranks=4).reshape(4, -1)}) == 4


def test_everything_about_a_token_moves_with_it():
    """Token, target, weight, document and position of one token stay in one column."""
    batch = {field: np.arange(16)[None] + 100 * n for n, field in enumerate(BATCH_FIELDS)}
    moved = reordered(batch, zigzag(16, ranks=2))
    assert set(moved) == set(BATCH_FIELDS)
    for n, field in enumerate(BATCH_FIELDS):
        np.testing.assert_array_equal(moved[field] - 100 * n, zigzag(16, ranks=2)[None])


@pytest.mark.parametrize("ordered, tokens, nearest", [(contiguous, 30, "28 or 32"), (zigzag, 36, "32 or 40")])
def test_rows_that_do_not_divide_name_lengths_that_do(ordered, tokens, nearest):
    with pytest.raises(UserError, match=rf"sequence_length: {tokens} tokens .*use {nearest}"):
        ordered(tokens, ranks=4)
