"""Packs codes of a few bits into bytes: neighbours along the first dimension share a byte, the first in its high bits.

    4 bits: codes 0, 1 in a byte      2 bits: 0 to 3 in a byte      3 bits: 0 to 7 in three bytes      8 bits: as it is

Four bits are packed as in bitsandbytes.
"""

import jax
import jax.numpy as jnp

PACKS = {8: (1, 1), 4: (2, 1), 3: (8, 3), 2: (4, 1)}  # bits of a code -> (codes, bytes) of a pack


def pack_codes(codes: jax.Array, *, bits: int) -> jax.Array:
    """codes [n, ...] uint8 below 2^bits -> [n bits / 8, ...] uint8."""
    count, size = PACKS[bits]
    groups = codes.reshape(-1, count, *codes.shape[1:]).astype(jnp.uint32)
    bits_of_pack = sum(groups[:, index] << (bits * (count - 1 - index)) for index in range(count))
    packs = jnp.stack([(bits_of_pack >> (8 * (size - 1 - index))) & 255 for index in range(size)], axis=1)
    return packs.reshape(-1, *codes.shape[1:]).astype(jnp.uint8)


def unpack_codes(packs: jax.Array, *, bits: int) -> jax.Array:
    """The inverse of `pack_codes`: [n bits / 8, ...] uint8 -> codes [n, ...] uint8."""
    count, size = PACKS[bits]
    if count == 1:
        return packs
    wide = packs if size == 1 else packs.astype(jnp.uint32)
    groups = wide.reshape(-1, size, *packs.shape[1:])
    bits_of_pack = (
        groups[:, 0] if size == 1 else sum(groups[:, index] << (8 * (size - 1 - index)) for index in range(size))
    )
    codes = jnp.stack(
        [(bits_of_pack >> (bits * (count - 1 - index))) & (2**bits - 1) for index in range(count)], axis=1
    )
    return codes.reshape(-1, *packs.shape[1:]).astype(jnp.uint8)
