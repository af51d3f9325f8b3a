"""Long or reordered sequences: tiles of one query block and one key block, only those that have a visible pair.

Every block of queries gets a list of key blocks, computed from the smallest and the largest index in each block: at
compile time if the order is plain, else at run time from the indexes (a zigzag slice, a key cache), when the length of
the inner loop varies. The forward pass rescales a running softmax (arXiv:2307.08691, algorithm 1); the backward pass
keeps dq of one query block and adds into dk, dv. No array is larger than the inputs and a tile.

Only the order decides what is skipped. Tiles between two documents are computed and masked: they differ from row to row
of a batch, and to skip them the devices of the rows would have to communicate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import tile
from .interface import Mask, TokenIndices


class Blocks(NamedTuple):
    """A sequence in `count` blocks of `size` tokens, the last one padded."""

    size: int
    count: int
    tokens: int

    @classmethod
    def of(cls, tokens: int, size: int) -> "Blocks":
        size = min(size, tokens)
        return cls(size, -(-tokens // size), tokens)

    def pad(self, x, axis: int, value=0):
        """Pad the last block along `axis`."""
        padding = self.size * self.count - self.tokens
        if not padding:
            return x
        widths = [(0, padding if dimension == axis else 0) for dimension in range(x.ndim)]
        return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths, constant_values=value)

    def take(self, x, block, axis: int = 1):
        """Block number `block` (traced) of a padded array."""
        return jax.lax.dynamic_slice_in_dim(x, block * self.size, self.size, axis)

    def update(self, x, values, block):
        """`x` with block number `block` replaced by `values`, along axis 1."""
        return jax.lax.dynamic_update_slice_in_dim(x, values, block * self.size, axis=1)


class Plan(NamedTuple):
    """The tiles that both passes walk over."""

    queries: Blocks
    keys: Blocks
    query_index: jax.Array  # [padded queries]
    key_index: jax.Array  # [padded keys], PADDING past the end
    query_segments: jax.Array | None  # [batch, padded queries]
    key_segments: jax.Array | None
    visits: jax.Array  # [query blocks, key blocks]: key blocks that each query block visits, then the others
    visit_counts: jax.Array  # [query blocks]: how many it visits

    def visibility(self, mask: Mask, i, j):
        """The visibility of tile (i, j)."""
        segments = (None, None)
        if self.query_segments is not None:
            segments = self.queries.take(self.query_segments, i), self.keys.take(self.key_segments, j)
        indexes = self.queries.take(self.query_index, i, axis=0), self.keys.take(self.key_index, j, axis=0)
        padded = self.keys.size * self.keys.count > self.keys.tokens
        return tile.visibility(mask, *indexes, *segments, padded=padded)


def forward(q, k, v, mask: Mask, indices: TokenIndices, *, block: int) -> tuple[jax.Array, jax.Array]:
    """out like q, and lse [batch, queries, heads]."""
    plan = _plan(q.shape[1], k.shape[1], mask, indices, block)
    kv_heads = k.shape[2]
    q, k, v = plan.queries.pad(q, 1), plan.keys.pad(k, 1), plan.keys.pad(v, 1)

    def query_block_step(i, carry):
        out, lse = carry
        q_tile = tile.to_tile(plan.queries.take(q, i), kv_heads)

        def key_block_step(n, running):
            j = plan.visits[i, n]
            k_tile, v_tile = (tile.to_tile(plan.keys.take(x, j), kv_heads) for x in (k, v))
            return _accumulate(running, q_tile, k_tile, v_tile, plan.visibility(mask, i, j), mask)

        accumulator = _zeros_like(q_tile)
        total = accumulator[..., 0]
        start = (accumulator, total - jnp.inf, total)
        accumulator, maximum, total = jax.lax.fori_loop(0, plan.visit_counts[i], key_block_step, start)
        block_out = accumulator / jnp.where(total > 0, total, 1.0)[..., None]
        block_lse = tile.log_sum_exp(maximum, total)
        size = plan.queries.size
        return (
            plan.queries.update(out, tile.from_tile(block_out.astype(out.dtype), size), i),
            plan.queries.update(lse, tile.statistics_from_tile(block_lse, size), i),
        )

    start = (_zeros_like(q, q.dtype), _zeros_like(q)[..., 0])
    out, lse = jax.lax.fori_loop(0, plan.queries.count, query_block_step, start)
    return out[:, : plan.queries.tokens], lse[:, : plan.queries.tokens]


def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices, *, block: int):
    """dq, dk, dv like q, k, v."""
    plan = _plan(q.shape[1], k.shape[1], mask, indices, block)
    kv_heads, like = k.shape[2], (q.dtype, k.dtype, v.dtype)
    q, out, lse, d_out = (plan.queries.pad(x, 1) for x in (q, out, lse, d_out))
    k, v = plan.keys.pad(k, 1), plan.keys.pad(v, 1)

    def query_block_step(i, carry):
        dq, dk, dv = carry
        q_block, out_block, d_out_block = (plan.queries.take(x, i) for x in (q, out, d_out))
        delta = jnp.sum(d_out_block.astype(jnp.float32) * out_block.astype(jnp.float32), axis=-1)
        q_tile, d_out_tile = tile.to_tile(q_block, kv_heads), tile.to_tile(d_out_block, kv_heads)
        statistics = [tile.statistics_to_tile(x, kv_heads) for x in (plan.queries.take(lse, i), delta)]

        def key_block_step(n, running):
            dq_tile, dk, dv = running
            j = plan.visits[i, n]
            k_tile, v_tile = (tile.to_tile(plan.keys.take(x, j), kv_heads) for x in (k, v))
            dq_part, dk_part, dv_part = tile.tile_gradients(
                q_tile, k_tile, v_tile, *statistics, d_out_tile, plan.visibility(mask, i, j), mask
            )
            dk = plan.keys.update(dk, plan.keys.take(dk, j) + tile.keys_from_tile(dk_part), j)
            dv = plan.keys.update(dv, plan.keys.take(dv, j) + tile.keys_from_tile(dv_part), j)
            return dq_tile + dq_part, dk, dv

        start = (_zeros_like(q_tile), dk, dv)
        dq_tile, dk, dv = jax.lax.fori_loop(0, plan.visit_counts[i], key_block_step, start)
        return plan.queries.update(dq, tile.from_tile(dq_tile.astype(dq.dtype), plan.queries.size), i), dk, dv

    start = (_zeros_like(q, q.dtype), _zeros_like(k), _zeros_like(v))
    gradients = jax.lax.fori_loop(0, plan.queries.count, query_block_step, start)
    ends = (plan.queries.tokens, plan.keys.tokens, plan.keys.tokens)
    return tuple(x[:, :end].astype(dtype) for x, end, dtype in zip(gradients, ends, like, strict=True))


def _accumulate(running, q_tile, k_tile, v_tile, visible, mask: Mask):
    """Add a tile to a running softmax: (sum of weights @ v, largest score, sum of weights), rescaled."""
    accumulator, maximum, total = running
    masked = tile.apply_visibility(tile.scores(q_tile, k_tile, mask), visible)
    higher = jnp.maximum(maximum, jnp.max(masked, axis=-1))
    weights = jnp.exp(masked - tile.finite(higher)[..., None])
    rescale = jnp.exp(maximum - tile.finite(higher))
    product = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v_tile.dtype), v_tile, preferred_element_type=jnp.float32)
    return accumulator * rescale[..., None] + product, higher, total * rescale + jnp.sum(weights, axis=-1)


def _zeros_like(x: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Zeros that vary over the same manual mesh axes as `x`, as the carry of a loop must inside `shard_map`."""
    return jnp.where(jnp.zeros(x.shape, bool), x, 0).astype(dtype)


def _plan(queries: int, keys: int, mask: Mask, indices: TokenIndices, block: int) -> Plan:
    query_blocks, key_blocks = Blocks.of(queries, block), Blocks.of(keys, block)
    query_index = np.arange(queries) if indices.query_index is None else indices.query_index
    key_index = np.arange(keys) if indices.key_index is None else indices.key_index
    query_index = query_blocks.pad(query_index, 0)
    key_index = key_blocks.pad(key_index, 0, tile.PADDING)
    segments = (None, None)
    if indices.query_segments is not None:
        segments = query_blocks.pad(indices.query_segments, 1), key_blocks.pad(indices.key_segments, 1)
    visits, counts = plan_visits(query_blocks, key_blocks, query_index, key_index, mask)
    arrays = (jnp.asarray(x, jnp.int32) for x in (query_index, key_index))
    return Plan(query_blocks, key_blocks, *arrays, *segments, jnp.asarray(visits), jnp.asarray(counts))


def plan_visits(query_blocks: Blocks, key_blocks: Blocks, query_index, key_index, mask: Mask):
    """Plan.visits and Plan.visit_counts; computed at compile time if the indexes are NumPy arrays."""
    xp = np if isinstance(query_index, np.ndarray) and isinstance(key_index, np.ndarray) else jnp
    by_query_block = query_index.reshape(query_blocks.count, -1)
    by_key_block = key_index.reshape(key_blocks.count, -1)
    possible = xp.ones((query_blocks.count, key_blocks.count), bool)
    if mask.causal or mask.window is not None:
        possible &= by_query_block.max(1)[:, None] >= by_key_block.min(1)[None, :]
    if mask.window is not None:
        possible &= by_query_block.min(1)[:, None] - by_key_block.max(1)[None, :] < mask.window
    visits = xp.argsort(~possible, axis=1, stable=True)
    return visits.astype(np.int32), possible.sum(1).astype(np.int32)
