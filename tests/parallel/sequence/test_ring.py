"""Which parts of a row a ring step leaves out."""

import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.attention.interface import Mask, TokenIndices
from meshwright.parallel.sequence.ring import Part, _may_see

OURS = TokenIndices(jnp.arange(8, 16), jnp.arange(8, 16), jnp.array([[2, 2, 2, 2, 3, 3, 3, 3]]), None)

# mask, indices of the part's keys, their documents -> may any of our queries, 8-15 of documents 2 and 3, see one?
PARTS = {
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


@pytest.mark.parametrize("mask, index, documents, expected", PARTS.values(), ids=PARTS)
def test_a_part_is_left_out_only_if_no_query_sees_it(mask, index, documents, expected):
    segments = None if documents is None else jnp.array([documents])
    part = Part(None, None, jnp.array(list(index)), segments)
    assert bool(_may_see(part, mask, OURS)) == expected


def test_rows_whose_documents_differ_are_asked_one_by_one():
    """One row of the batch that shares a document is enough."""
    indices = TokenIndices(jnp.arange(4, 8), None, jnp.array(np.repeat([[1], [5]], 4, axis=1)), None)
    part = Part(None, None, jnp.arange(4), jnp.array(np.repeat([[0], [5]], 4, axis=1)))
    assert bool(_may_see(part, Mask(), indices))
