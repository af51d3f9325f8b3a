"""What a block is told besides its input: how to attend, multiply, constrain, and where its tokens stand.

Models never see a mesh. `train/` builds one `Context` per step out of functions that do; a test builds one out of
plain ones. The defaults compute on one device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .attention.dense import DENSE
from .attention.interface import Mask, TokenIndices, attend
from .rope import Rotation


def linear(x: jax.Array, kernel: jax.Array, *, inputs: int = 1) -> jax.Array:
    """Contract the last `inputs` dimensions of x [batch, sequence, ...] with the first `inputs` of `kernel`."""
    return jnp.tensordot(x, kernel, axes=inputs)


def flat_linear(x: jax.Array, kernel: jax.Array, *, inputs: int = 1) -> jax.Array:
    """`linear` as one [tokens, in] x [in, out] product: 1.6x faster on XLA:CPU. The sequence must be unsharded."""
    batch, sequence = x.shape[:2]
    flat = x.reshape(batch * sequence, -1) @ kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
    return flat.reshape(batch, sequence, *kernel.shape[inputs:])


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows [batch, sequence, embed] of `table` [padded_vocab, embed] at `tokens` [batch, sequence]."""
    return jnp.take(table, tokens, axis=0)


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> jax.Array:
    """The reference attention."""
    return attend(DENSE, q, k, v, mask, indices)


def unconstrained(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Leave `x` where it is."""
    del names
    return x


@dataclass(frozen=True)
class Context:
    """Everything a block reads that is neither its input nor its weights."""

    positions: jax.Array  # [batch, sequence] int32: place in the document, for rotations
    rotations: dict[bool, Rotation] | None = None  # of `positions`, made once for all blocks; None: in each block
    segment_ids: jax.Array | None = None  # [batch, sequence] int32: tokens see their own document only
    index: jax.Array | None = None  # [sequence] int32: place in the uncut row; None: in order. A cache needs it
    dropout_keys: jax.Array | None = None  # [batch] keys, one a row of the global batch; None: no dropout
    cache: Any = None  # keys and values of earlier tokens (`cache.py`); a block is given its own layer's
    cache_segment_ids: jax.Array | None = None  # [batch, capacity]: segment of each slot of the cache
    adapter_ids: jax.Array | None = None  # [batch] int32: which of several adapters each row belongs to
    adapter_product: Callable[..., jax.Array] | None = (
        None  # of rows and their own adapters' matrices (adapters/several.py)
    )
    shared_matrices: Any = None  # arrays that the adapters of all layers read (VeRA)
    prefix: Any = None  # {"k", "v"} in front of every document, shaped like a cache without rows; a block gets its own
    attend: Callable[..., jax.Array] = dense_attention  # (q, k, v, mask, indices) -> out
    linear: Callable[..., jax.Array] = linear
    lookup: Callable[[jax.Array, jax.Array], jax.Array] = lookup
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = unconstrained
    remat: Callable[[Callable], Callable] = lambda block: block  # wraps a block by the memory policy
    compute_dtype: Any = jnp.float32  # dtype of matrix products and activations
