"""A format of quantized weights: two pure functions of the groups of one linear map.

encode(groups [groups, group, outputs]) -> codes uint8 of that shape, statistics {name: [groups, outputs]}
decode(codes, statistics) -> groups float32
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

Leaves = dict[str, jax.Array]


@dataclass(frozen=True, eq=False)  # compared by identity
class CodeFormat:
    """One format for weights in few bits."""

    bits: int
    encode: Callable[[jax.Array], tuple[jax.Array, Leaves]]
    decode: Callable[[jax.Array, Leaves], jax.Array]
