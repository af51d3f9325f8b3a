"""`blockwise`: attention whose memory is linear in the sequence, by blocks of queries. The default on a CPU.

It walks over tiles in one of two ways, both with FlashAttention-2's backward pass: `query_blocks` for short sequences
in plain order, `tile_pairs` for all others. The shapes decide which.
"""

from collections.abc import Callable
from functools import partial

import jax

from . import query_blocks, tile_pairs
from .interface import Implementation, Mask, TokenIndices, never_refuse

# Measured on 2 cores, float32 (`meshwright bench attention`).
ROW_BLOCK = 128
LONGEST_UNROLLED = 1024  # tokens; beyond, unrolled blocks cost compile time, and their tiles memory
TILE_SCORES = 2**20  # over all heads and rows of a batch; larger tiles do not fit into a CPU's cache
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512


def forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> tuple[jax.Array, jax.Array]:
    """out like q, and lse [batch, queries, heads]."""
    if _uses_query_blocks(q, k, indices):
        run = partial(query_blocks.forward, mask=mask, block=ROW_BLOCK)
        return _by_batch_slices(run, (q, k, v), indices)
    return tile_pairs.forward(q, k, v, mask, indices, block=_pair_block(q))


def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv like q, k, v, given `out` and `lse` over all keys."""
    if _uses_query_blocks(q, k, indices):
        run = partial(query_blocks.backward, mask=mask, block=ROW_BLOCK)
        return _by_batch_slices(run, (q, k, v, out, lse, d_out), indices)
    return tile_pairs.backward(q, k, v, out, lse, d_out, mask, indices, block=_pair_block(q))


def _uses_query_blocks(q, k, indices: TokenIndices) -> bool:
    return indices.query_index is None and max(q.shape[1], k.shape[1]) <= LONGEST_UNROLLED


def _by_batch_slices(function: Callable, arrays: tuple[jax.Array, ...], indices: TokenIndices) -> tuple[jax.Array, ...]:
    """`function(*arrays, indices=)` on slices of the batch, so small that a tile stays in the cache of a CPU.

    At 8 x 512 tokens this is twice as fast as the whole batch at once: scores that leave the cache cost more than the
    products.
    """
    batch, queries, heads, _ = arrays[0].shape
    tile = heads * min(queries, ROW_BLOCK) * arrays[1].shape[1]
    fitting = max(1, TILE_SCORES // tile) if jax.default_backend() == "cpu" else batch
    size = max(divisor for divisor in range(1, batch + 1) if batch % divisor == 0 and divisor <= fitting)
    if size == batch:
        return function(*arrays, indices=indices)
    slices = jax.tree.map(lambda x: x.reshape(batch // size, size, *x.shape[1:]), (arrays, indices))
    results = jax.lax.map(lambda part: function(*part[0], indices=part[1]), slices)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def _pair_block(q) -> int:
    """Tokens along either side of a tile: a power of two, smaller for wide batches."""
    batch, _, heads, _ = q.shape
    side = 1 << (max(1, TILE_SCORES // (batch * heads)).bit_length() - 1) // 2
    return min(max(side, SMALLEST_BLOCK), LARGEST_BLOCK)


BLOCKWISE = Implementation("blockwise", never_refuse, forward, backward)
