"""The context of a block: how to attend, multiply and constrain, and the positions of its tokens.

Models never see a mesh. `train/` builds one `Context` per step out of functions that do; a test builds one out of plain
functions. The defaults compute on one device.
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
    """Attention by the reference implementation."""
    return attend(DENSE, q, k, v, mask, indices)


def no_constraint(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """`x`, with no sharding constraint."""
    del names
    return x


@dataclass(frozen=True)
class Context:
    """Everything that a block reads besides its input and its weights."""

    positions: jax.Array  # [batch, sequence] int32: position in the document, for rotations
    rotations: dict[bool, Rotation] | None = None  # of `positions`, computed once for all blocks; None: by each
    segment_ids: jax.Array | None = None  # [batch, sequence] int32: tokens see only their own document
    index: jax.Array | None = None  # [sequence] int32: index in the unsharded row; None: in order. A cache needs it
    dropout_keys: jax.Array | None = None  # [batch] keys, one a row of the global batch; None: no dropout
    cache: Any = None  # keys and values of earlier tokens (`kv_cache.py`); a block sees its own layer's
    cache_segment_ids: jax.Array | None = None  # [batch, capacity]: segment of each slot of the cache
    adapter_ids: jax.Array | None = None  # [batch] int32: which of several adapters each row uses
    adapter_product: Callable[..., jax.Array] | None = None  # rows times their adapters' matrices (`multi_lora.py`)
    shared_matrices: Any = None  # matrices that the adapters of all layers read (`adapters/vera.py`)
    prefix: Any = None  # {"k", "v"} before every document, shaped like a cache without rows; a block sees its own
    attend: Callable[..., jax.Array] = dense_attention  # (q, k, v, mask, indices) -> out
    linear: Callable[..., jax.Array] = linear
    lookup: Callable[[jax.Array, jax.Array], jax.Array] = lookup
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = no_constraint
    remat: Callable[[Callable], Callable] = lambda block: block  # wraps a block with the memory policy
    compute_dtype: Any = jnp.float32  # dtype of matrix products and activations
