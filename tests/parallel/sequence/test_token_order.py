"""Orders of a row: each token once, and equal work in zigzag order."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.sequence.token_order import STRATEGY_ORDERS, contiguous, zigzag


@pytest.mark.parametrize("ordered", set(STRATEGY_ORDERS.values()))
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_token_is_in_the_order_once(ordered, ranks):
    assert sorted(ordered(32, ranks=ranks)) == list(range(32))


def test_zigzag_gives_every_device_the_same_causal_work():
    work = [(part + 1).sum() for part in zigzag(64, ranks=4).reshape(4, -1)]
    assert len(set(work)) == 1
    assert len({(part + 1).sum() for part in contiguous(64, ranks=4).reshape(4, -1)}) == 4


@pytest.mark.parametrize("ordered, tokens, nearest", [(contiguous, 30, "28 or 32"), (zigzag, 36, "32 or 40")])
def test_a_length_that_does_not_divide_is_refused_with_lengths_that_do(ordered, tokens, nearest):
    with pytest.raises(UserError, match=rf"sequence_length: {tokens} tokens.*use {nearest}"):
        ordered(tokens, ranks=4)
