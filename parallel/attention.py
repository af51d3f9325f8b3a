"""Attention on the mesh: its implementation, its sharding over devices, and the order of the tokens."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from ..models.attention.interface import Mask, TokenIndices, attend
from ..models.attention.registry import choose
from .sequence.attend import sequence_parallel
from .sequence.token_order import STRATEGY_ORDERS


def sharded_attention(name: str, *, mesh: Mesh, strategy: str) -> Callable[..., jax.Array]:
    """`attend(q, k, v, mask, indices)` over global arrays [batch, sequence, heads, head_dim] for `model.attention:
    name`.

    `strategy` is `sequence.parallel`, used if the mesh's `seq` is above 1. The result equals that of one device. Raises
    UserError if the implementation or the strategy refuses the combination.
    """
    platform = mesh.devices.flat[0].platform

    def attend_sharded(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> jax.Array:
        implementation = choose(name, mask=mask, indices=indices, q=q, k=k, platform=platform)
        if mesh.size == 1:
            return attend(implementation, q, k, v, mask, indices)
        return sequence_parallel(implementation, strategy=strategy, mesh=mesh)(q, k, v, mask, indices)

    return attend_sharded


def token_order(tokens: int, *, mesh: Mesh, strategy: str) -> np.ndarray | None:
    """The token at each position of a row on `mesh`, int32 [tokens]; None: plain order."""
    ranks = mesh.shape["seq"]
    order = STRATEGY_ORDERS[strategy](tokens, ranks=ranks) if ranks > 1 else None
    return None if order is None or (order == np.arange(tokens)).all() else order
