"""Norms of each row's gradient, without the gradients: rules for linear maps, lookups, and all that is small.

    squared = jax.grad(lambda probe: loss of one row, computed with rules(probe))(0.0)

A map that is told a `probe`, a number it does not use, gives it as its "gradient" the squared norm of its weights' own.
So the sum over all maps, through scans and recomputation, is what differentiation adds up anyway. Mapped over rows, a
linear map's norm is made of two [tokens, tokens] products in place of its gradient,

    |x^T g|^2 = sum((x x^T) * (g g^T))        x [tokens, inputs] what it read, g [tokens, outputs] its output's gradient

where that is less than the gradient itself; a lookup's of the products of the gradients of equal tokens; what is small
(norms, biases, thin factors that are no map) is watched: its gradient is made for each row, and only its norm stays.
Source: arXiv:2110.05679, section 4.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Linear = Callable[..., jax.Array]
Lookup = Callable[[jax.Array, jax.Array], jax.Array]


def probed_linear(plain: Linear, probe: jax.Array) -> Linear:
    """`plain(x, kernel, inputs=n)`, whose kernel's squared gradient norm goes to `probe` where it is trained."""

    def told(x: jax.Array, kernel: jax.Array, *, inputs: int = 1) -> jax.Array:
        def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return plain(x, kernel, inputs=inputs)

        def norm(x: jax.Array, g: jax.Array) -> jax.Array:
            last = x.ndim - inputs
            return product_norm(x.reshape(-1, math.prod(x.shape[last:])), g.reshape(-1, math.prod(g.shape[last:])))

        return with_norm_rule(run, norm)(x, kernel, probe)

    return told


def probed_lookup(plain: Lookup, probe: jax.Array) -> Lookup:
    """`plain(table, tokens)`, whose table's squared gradient norm goes to `probe` where it is trained."""

    def told(table: jax.Array, tokens: jax.Array) -> jax.Array:
        def norm(tokens: jax.Array, g: jax.Array) -> jax.Array:
            tokens, g = tokens.reshape(-1), g.reshape(tokens.size, -1).astype(jnp.float32)
            return ((tokens[:, None] == tokens) * (g @ g.T)).sum()

        return with_norm_rule(lambda tokens, table: plain(table, tokens), norm)(tokens, table, probe)

    return told


def product_norm(x: jax.Array, g: jax.Array) -> jax.Array:
    """|x^T g|^2 of x [tokens, inputs] and g [tokens, outputs], by whichever way makes less."""
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    tokens, inputs, outputs = *x.shape, g.shape[1]
    if 2 * tokens**2 < inputs * outputs:
        return ((x @ x.T) * (g @ g.T)).sum()
    return jnp.square(x.T @ g).sum()


def with_norm_rule(run: Callable[..., jax.Array], norm: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run(x, weight)` of (x, weight, probe); the probe's gradient is `norm(x, g)` where the weight is trained.

    The weight itself has none: where norms are wanted, gradients are not.
    """

    @jax.custom_vjp
    def told(x: jax.Array, weight: jax.Array, probe: jax.Array) -> jax.Array:
        del probe
        return run(x, weight)

    def forward(x: Any, weight: Any, probe: Any) -> tuple[jax.Array, Any]:
        del probe
        # What is trained is known here and, as the presence of a residual, there.
        return run(x.value, weight.value), (x.value, weight.value, () if weight.perturbed else None)

    def backward(residuals: Any, g: Any) -> tuple[Any, None, Any]:
        x, weight, trained = residuals
        if isinstance(g, SymbolicZero):
            return None, None, None
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        back = None if whole else jax.vjp(lambda x: run(x, weight), x)[1](g)[0]
        return back, None, None if trained is None else norm(x, g)

    told.defvjp(forward, backward, symbolic_zeros=True)
    return told


@jax.custom_vjp
def probed(leaf: jax.Array, probe: jax.Array) -> jax.Array:
    """`leaf`, whose squared gradient norm goes to `probe`."""
    del probe
    return leaf


def _watch(leaf: jax.Array, probe: jax.Array) -> tuple[jax.Array, None]:
    del probe
    return leaf, None


def _watching(_: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(g), jnp.square(g.astype(jnp.float32)).sum()


probed.defvjp(_watch, _watching)
