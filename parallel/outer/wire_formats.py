"""Wire formats: how a float32 array travels over a slow link, and what arrives.

Values are coded along the last dimension in blocks that share one float32 scale, their largest magnitude, so that the
top code is exact. Whoever receives decodes to float32 and adds there; nothing is ever summed in a narrow format.

    float32   32 bits, no scales       bf16   16 bits, no scales
    int8      k / 127 of the scale, k in -127..127
    fp8       e4m3 over the scale: 3 bits of mantissa, subnormals
    e3m0      a sign and 3 bits of exponent: 0 and +-2^-6 .. 2^0 of the scale; two codes a byte (arXiv:2501.18512)

What lies on a format's grid, as anything it has decoded does, comes back bit for bit. Values must be finite.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .wire_sizes import block_size


class Coded(NamedTuple):
    """An array [..., n] on the wire; leading dimensions are as they were, so that it is sharded as they are."""

    codes: jax.Array  # unsigned integers [..., blocks, codes of a block]; without scales [..., n]
    scales: jax.Array | None  # float32 [..., blocks, 1]


class Wire(NamedTuple):
    """One format. `decode(encode(x), x.shape[-1])` is `x` rounded to the grid, float32."""

    encode: Callable[[jax.Array], Coded]  # float32 [..., n]
    decode: Callable[[Coded, int], jax.Array]


def scaled(encode: Callable[[jax.Array], jax.Array], decode: Callable[[jax.Array], jax.Array]) -> Wire:
    """A format of values in [-1, 1], `encode` to codes and `decode` from them, with a scale a block."""

    def coded(x: jax.Array) -> Coded:
        blocks = in_blocks(x.astype(jnp.float32))
        scales = jnp.abs(blocks).max(axis=-1, keepdims=True)
        # A scale that is zero or subnormal, which processors flush to zero, says that nothing here counts.
        ratio = jnp.where(scales >= jnp.finfo(jnp.float32).tiny, blocks / scales, 0)
        return Coded(encode(ratio), scales)

    def decoded(coded: Coded, length: int) -> jax.Array:
        wide = decode(coded.codes) * coded.scales
        return wide.reshape(*wide.shape[:-2], -1)[..., :length]

    return Wire(coded, decoded)


def in_blocks(x: jax.Array) -> jax.Array:
    """[..., n] -> [..., blocks, block], filled up with zeros."""
    length = x.shape[-1]
    block = block_size(length)
    padding = -length % block
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, block)


def plain(dtype: Any) -> Wire:
    """A format that is a dtype, without scales."""
    return Wire(lambda x: Coded(bits(x, dtype), None), lambda coded, length: values(coded.codes, dtype))


def bits(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded to `dtype`, as unsigned integers: no compiler widens those on their way."""
    narrow = x.astype(dtype)
    return jax.lax.bitcast_convert_type(narrow, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[narrow.dtype.itemsize])


def values(codes: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `bits`, float32."""
    return jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)


def over_largest(dtype: Any, largest: float) -> np.ndarray:
    """What each of the 256 codes of `dtype` stands for over the largest, float32 [256]."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) / np.float32(largest)


def looked_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Values of codes. A table and not a division, which compilers turn into a product that misses 1 by a bit."""
    return jnp.take(table, codes.astype(jnp.int32))


E3M0 = np.array([0, *(2.0 ** np.arange(-6, 1))], np.float32)  # magnitudes by exponent code
E3M0_SIGNED = np.concatenate([E3M0, -E3M0])


def encode_e3m0(ratio: jax.Array) -> jax.Array:
    """[..., 2k] in [-1, 1] -> uint8 [..., k]: the nearest magnitude's code and 8 for a minus; the first in low bits."""
    code = sum((jnp.abs(ratio) > middle).astype(jnp.uint8) for middle in (E3M0[1:] + E3M0[:-1]) / 2)
    code = code + 8 * (ratio < 0).astype(jnp.uint8)
    return code[..., 0::2] | code[..., 1::2] << 4


def decode_e3m0(codes: jax.Array) -> jax.Array:
    """The inverse of `encode_e3m0` on its grid."""
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    return looked_up(E3M0_SIGNED, pairs.reshape(*codes.shape[:-1], -1))


FP8, INT8 = 448.0, 127.0  # the largest codes
FP8_VALUES, INT8_VALUES = over_largest(jnp.float8_e4m3fn, FP8), over_largest(np.int8, INT8)

WIRES: dict[str, Wire] = {
    "float32": plain(jnp.float32),
    "bf16": plain(jnp.bfloat16),
    "fp8": scaled(lambda x: bits(x * FP8, jnp.float8_e4m3fn), partial(looked_up, FP8_VALUES)),
    "int8": scaled(lambda x: bits(jnp.round(x * INT8), jnp.int8), partial(looked_up, INT8_VALUES)),
    "e3m0": scaled(encode_e3m0, decode_e3m0),
}


def rounded(wire: Wire, x: jax.Array) -> jax.Array:
    """What arrives of `x`, float32; a scalar travels as an array of one."""
    return wire.decode(wire.encode(x), x.shape[-1]) if x.ndim else rounded(wire, x[None])[0]
