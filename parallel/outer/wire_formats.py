"""Wire formats: how a float32 array is coded to cross a slow link.

Values are coded along the last dimension in blocks that share one float32 scale, their largest magnitude, so that the
largest code is exact. The receiver decodes to float32 and adds there; nothing is ever summed in a narrow format.

    float32   32 bits, no scales       bf16   16 bits, no scales
    int8      k / 127 of the scale, k in -127..127
    fp8       e4m3 over the scale: 3 bits of mantissa, subnormals
    e3m0      a sign and 3 bits of exponent: 0 and +-2^-6 .. 2^0 of the scale; two codes a byte (arXiv:2501.18512)

Values on a format's grid, such as decoded ones, survive coding bit for bit. Values must be finite.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .wire_sizes import block_size


class EncodedArray(NamedTuple):
    """An array [..., n] on the wire; leading dimensions are unchanged, so that they may be sharded as before."""

    codes: jax.Array  # unsigned integers [..., blocks, codes of a block]; without scales [..., n]
    scales: jax.Array | None  # float32 [..., blocks, 1]


class WireFormat(NamedTuple):
    """One format. `decode(encode(x), x.shape[-1])` is `x` rounded to the grid, float32."""

    encode: Callable[[jax.Array], EncodedArray]  # float32 [..., n]
    decode: Callable[[EncodedArray, int], jax.Array]


def block_scaled(encode: Callable[[jax.Array], jax.Array], decode: Callable[[jax.Array], jax.Array]) -> WireFormat:
    """A format with a scale for each block: `encode` values in [-1, 1] to codes, and `decode` them."""

    def encode_blocks(x: jax.Array) -> EncodedArray:
        blocks = split_blocks(x.astype(jnp.float32))
        scales = jnp.abs(blocks).max(axis=-1, keepdims=True)
        # A block whose scale is zero or subnormal, which processors flush to zero, becomes zeros.
        ratio = jnp.where(scales >= jnp.finfo(jnp.float32).tiny, blocks / scales, 0)
        return EncodedArray(encode(ratio), scales)

    def decode_blocks(coded: EncodedArray, length: int) -> jax.Array:
        values = decode(coded.codes) * coded.scales
        return values.reshape(*values.shape[:-2], -1)[..., :length]

    return WireFormat(encode_blocks, decode_blocks)


def split_blocks(x: jax.Array) -> jax.Array:
    """[..., n] -> [..., blocks, block], padded with zeros."""
    block = block_size(x.shape[-1])
    if padding := -x.shape[-1] % block:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, block)


def without_scales(dtype: Any) -> WireFormat:
    """A format that is a dtype, without scales."""
    return WireFormat(lambda x: EncodedArray(to_bits(x, dtype), None), lambda coded, _: from_bits(coded.codes, dtype))


def to_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded to `dtype`, as unsigned integers: no compiler widens those on their way."""
    narrow = x.astype(dtype)
    return jax.lax.bitcast_convert_type(narrow, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[narrow.dtype.itemsize])


def from_bits(codes: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `to_bits`, float32."""
    return jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)


def code_values(dtype: Any, largest: float) -> np.ndarray:
    """The value of each of the 256 codes of `dtype` over the `largest`, float32 [256]."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) / np.float32(largest)


def decode_by_table(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Values of codes. Not by a division, which compilers turn into a product that misses 1 by a bit."""
    return jnp.take(table, codes.astype(jnp.int32))


E3M0 = np.array([0, *(2.0 ** np.arange(-6, 1))], np.float32)  # magnitudes by exponent code
E3M0_SIGNED = np.concatenate([E3M0, -E3M0])


def encode_e3m0(ratio: jax.Array) -> jax.Array:
    """Round to 4 bits: [..., 2k] in [-1, 1] -> uint8 [..., k].

    A code is that of the nearest magnitude, plus 8 for a minus; the first one of a byte is in the low bits.
    """
    code = sum((jnp.abs(ratio) > middle).astype(jnp.uint8) for middle in (E3M0[1:] + E3M0[:-1]) / 2)
    code = code + 8 * (ratio < 0).astype(jnp.uint8)
    return code[..., 0::2] | code[..., 1::2] << 4


def decode_e3m0(codes: jax.Array) -> jax.Array:
    """The inverse of `encode_e3m0` on its grid."""
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    return decode_by_table(E3M0_SIGNED, pairs.reshape(*codes.shape[:-1], -1))


FP8, INT8 = 448.0, 127.0  # the largest codes
FP8_VALUES, INT8_VALUES = code_values(jnp.float8_e4m3fn, FP8), code_values(np.int8, INT8)

WIRE_FORMATS: dict[str, WireFormat] = {
    "float32": without_scales(jnp.float32),
    "bf16": without_scales(jnp.bfloat16),
    "fp8": block_scaled(lambda x: to_bits(x * FP8, jnp.float8_e4m3fn), partial(decode_by_table, FP8_VALUES)),
    "int8": block_scaled(lambda x: to_bits(jnp.round(x * INT8), jnp.int8), partial(decode_by_table, INT8_VALUES)),
    "e3m0": block_scaled(encode_e3m0, decode_e3m0),
}


def round_trip(wire: WireFormat, x: jax.Array) -> jax.Array:
    """`x` coded and decoded, float32; a scalar is an array of one."""
    return wire.decode(wire.encode(x), x.shape[-1]) if x.ndim else round_trip(wire, x[None])[0]
