"""The layers of a block: linear maps, norms, dropout."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from .context import Context
from .quantized.kernel import linear_product

# Variance 1 / fan-in, truncated at two sigma: keeps activations at unit scale whatever the width.
initializer = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Linear(nnx.Module):
    """y = x kernel (+ bias), over one or several input and output dimensions, e.g. [embed] -> [heads, head_dim].

    An `adapter` (inserted by `adapters/attach.py`) computes y from kernel and bias instead. The kernel may be quantized
    (`quantized_model.py`).
    """

    adapter = None

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, bias: bool, rngs: nnx.Rngs):
        flat = initializer(rngs.params(), (math.prod(inputs), math.prod(outputs)), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.inputs = len(inputs)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        if self.adapter is not None:
            bias = None if self.bias is None else self.bias[...]
            return self.adapter(x, self.kernel[...], bias, ctx, inputs=self.inputs)
        y = linear_product(x, self.kernel[...], ctx, inputs=self.inputs)
        return y if self.bias is None else y + self.bias[...].astype(ctx.compute_dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale in float32; with `unit_offset` * (1 + scale), starting at zero. Source: arXiv:1910.07467.

    The mean is over the last `dimensions` of x, which hold `width` elements.
    """

    def __init__(self, width: int, *, epsilon: float, unit_offset: bool, dimensions: int = 1):
        self.scale = nnx.Param(jnp.zeros(width) if unit_offset else jnp.ones(width))
        self.epsilon, self.offset, self.dimensions = epsilon, float(unit_offset), dimensions

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        last = tuple(range(-self.dimensions, 0))
        unit = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=last, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32).reshape(x.shape[-self.dimensions :])
        return (unit * (self.offset + scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias in float32. Source: arXiv:1607.06450."""

    def __init__(self, width: int, *, epsilon: float):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (unit * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def dropout(
    x: jax.Array, keys: jax.Array | None, *, rate: float, salt: int, index: jax.Array | None = None
) -> jax.Array:
    """Zero elements of x [batch, sequence, ...] with probability `rate`.

    Each token draws by its row's key and its index in the unsharded row, `index` [sequence] (None: in order), so that
    neither the mesh nor its order of tokens changes which elements are dropped.
    """
    if keys is None or rate == 0:
        return x

    def keep_token(key: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[2:])

    def keep_row(key: jax.Array) -> jax.Array:
        indexes = jnp.arange(x.shape[1]) if index is None else index
        return jax.vmap(keep_token, (None, 0))(jax.random.fold_in(key, salt), indexes)

    return jnp.where(jax.vmap(keep_row)(keys), x / (1 - rate), 0)
