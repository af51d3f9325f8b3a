"""The tiles that the walk over pairs of blocks visits: all with a visible pair, and few others."""

import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.attention.interface import Mask
from meshwright.models.attention.tile_pairs import Blocks, plan_visits

SHUFFLED = np.random.default_rng(0).permutation(64).astype(np.int32)
BACK_TO_FRONT = np.concatenate([np.arange(48, 64), np.arange(16)]).astype(np.int32)

# mask, query index, key index -> visited tiles of 8 x 8 blocks of 8 (4 x 8 for the half sequence)
VISITS = {
    "causal": (Mask(), np.arange(64), np.arange(64), 36),
    "both-ways": (Mask(causal=False), np.arange(64), np.arange(64), 64),
    "window": (Mask(window=9), np.arange(64), np.arange(64), 15),
    "window-one-more": (Mask(window=10), np.arange(64), np.arange(64), 21),
    "zigzag-half": (Mask(), BACK_TO_FRONT, np.arange(64), 1 + 2 + 7 + 8),
    "future": (Mask(), np.arange(64), np.arange(64) + 64, 0),
}


@pytest.mark.parametrize("xp", [np, jnp], ids=["when-compiled", "at-run-time"])
@pytest.mark.parametrize("mask, query_index, key_index, expected", VISITS.values(), ids=VISITS)
def test_only_tiles_with_a_visible_pair_are_visited(xp, mask, query_index, key_index, expected):
    blocks = Blocks.of(len(query_index), 8), Blocks.of(len(key_index), 8)
    visits, counts = plan_visits(*blocks, xp.asarray(query_index), xp.asarray(key_index), mask)
    assert isinstance(counts, np.ndarray) == (xp is np), "plain order is planned before the program runs"
    assert counts.sum() == expected
    age = query_index[:, None] - key_index[None]
    visited = np.ones(age.shape, bool) if not mask.causal else (age >= 0) & (age < (mask.window or 999))
    for block, rows in enumerate(visited.reshape(blocks[0].count, 8, blocks[1].count, 8).any((1, 3))):
        assert set(np.flatnonzero(rows)) <= set(np.asarray(visits[block][: counts[block]]).tolist())


def test_every_visible_tile_is_visited_in_any_order_of_tokens():
    """With shuffled tokens each block has a wide range of indexes."""
    blocks = Blocks.of(64, 8)
    visits, counts = plan_visits(blocks, blocks, SHUFFLED, SHUFFLED, Mask(window=5))
    age = SHUFFLED[:, None] - SHUFFLED[None]
    visible = ((age >= 0) & (age < 5)).reshape(8, 8, 8, 8).any((1, 3))
    assert all(set(np.flatnonzero(row)) <= set(v[:n]) for row, v, n in zip(visible, visits, counts, strict=True))
