"""The key shards that a ring step skips."""

import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.attention.interface import Mask, TokenIndices
from meshwright.parallel.sequence.ring import KeyShard, may_attend

QUERIES = TokenIndices(jnp.arange(8, 16), jnp.arange(8, 16), jnp.array([[2, 2, 2, 2, 3, 3, 3, 3]]), None)

# mask, indices of the keys, their documents -> may any of the queries 8-15, of documents 2 and 3, attend to one?
SHARDS = {
    "past": (Mask(), range(0, 8), None, True),
    "future": (Mask(), range(16, 24), None, False),
    "one-key-in-time": (Mask(), [30, 15], None, True),
    "future-both-ways": (Mask(causal=False), range(16, 24), None, True),
    "past-the-window": (Mask(window=4), range(0, 5), None, False),
    "in-the-window": (Mask(window=4), range(0, 6), None, True),
    "same-document": (Mask(), range(0, 8), [1, 1, 1, 1, 1, 1, 1, 2], True),
    "earlier-documents": (Mask(), range(0, 8), [0, 0, 0, 0, 1, 1, 1, 1], False),
    "later-documents": (Mask(causal=False), range(16, 24), [4, 4, 4, 4, 5, 5, 5, 5], False),
}


@pytest.mark.parametrize("mask, index, documents, expected", SHARDS.values(), ids=SHARDS)
def test_a_shard_is_skipped_only_if_no_query_may_attend_to_it(mask, index, documents, expected):
    segments = None if documents is None else jnp.array([documents])
    shard = KeyShard(None, None, jnp.array(list(index)), segments)
    assert bool(may_attend(shard, mask, QUERIES)) == expected


def test_documents_are_compared_row_by_row():
    """One row of the batch with a common document is enough."""
    indices = TokenIndices(jnp.arange(4, 8), None, jnp.array(np.repeat([[1], [5]], 4, axis=1)), None)
    shard = KeyShard(None, None, jnp.arange(4), jnp.array(np.repeat([[0], [5]], 4, axis=1)))
    assert bool(may_attend(shard, Mask(), indices))
