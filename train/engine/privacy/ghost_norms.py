"""Norms of each row's gradient without the gradients ("ghost norms"), for linear maps, lookups and small weights.

    squared_norm = jax.grad(lambda probe: loss of one row, computed with probed functions)(0.0)

A probed function takes a scalar `probe` that it does not use. The "gradient" of the probe is the squared norm of the
gradient of the function's weight, so differentiation adds up the norms of all weights, through scans and recomputation.
With `vmap` over rows, the norm of a linear map comes from two [tokens, tokens] products instead of its gradient,

    |x^T g|^2 = sum((x x^T) * (g g^T))        x [tokens, inputs] its input, g [tokens, outputs] its output's gradient

if they are smaller than the gradient itself. The norm of a lookup comes from products of the gradients of equal tokens.
Small weights (norms, biases, thin factors) are probed themselves: their gradient is computed for each row, and only its
norm is kept. Source: arXiv:2110.05679, section 4.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Linear = Callable[..., jax.Array]
Lookup = Callable[[jax.Array, jax.Array], jax.Array]


def probed_linear(plain: Linear, probe: jax.Array) -> Linear:
    """`plain(x, kernel, inputs=n)`, which gives `probe` the squared gradient norm of a trained kernel."""

    def linear(x: jax.Array, kernel: jax.Array, *, inputs: int = 1) -> jax.Array:
        def norm(x: jax.Array, g: jax.Array) -> jax.Array:
            last = x.ndim - inputs
            return product_norm(x.reshape(-1, math.prod(x.shape[last:])), g.reshape(-1, math.prod(g.shape[last:])))

        return with_norm_rule(partial(plain, inputs=inputs), norm)(x, kernel, probe)

    return linear


def probed_lookup(plain: Lookup, probe: jax.Array) -> Lookup:
    """`plain(table, tokens)`, which gives `probe` the squared gradient norm of a trained table."""

    def norm(tokens: jax.Array, g: jax.Array) -> jax.Array:
        tokens, g = tokens.reshape(-1), g.reshape(tokens.size, -1).astype(jnp.float32)
        return ((tokens[:, None] == tokens) * (g @ g.T)).sum()

    lookup = with_norm_rule(lambda tokens, table: plain(table, tokens), norm)
    return lambda table, tokens: lookup(tokens, table, probe)


def product_norm(x: jax.Array, g: jax.Array) -> jax.Array:
    """|x^T g|^2 of x [tokens, inputs] and g [tokens, outputs], by whichever way needs the smaller arrays."""
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    tokens, inputs, outputs = *x.shape, g.shape[1]
    if 2 * tokens**2 < inputs * outputs:
        return ((x @ x.T) * (g @ g.T)).sum()
    return jnp.square(x.T @ g).sum()


def with_norm_rule(run: Callable[..., jax.Array], norm: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run(x, weight)` of (x, weight, probe), whose probe has the gradient `norm(x, g)` if the weight is trained.

    The weight itself gets no gradient.
    """

    @jax.custom_vjp
    def probed_run(x: jax.Array, weight: jax.Array, probe: jax.Array) -> jax.Array:
        del probe
        return run(x, weight)

    def forward(x: Any, weight: Any, probe: Any) -> tuple[jax.Array, Any]:
        del probe
        # Whether the weight is trained is known here only; the presence of a residual tells `backward`.
        return run(x.value, weight.value), (x.value, weight.value, () if weight.perturbed else None)

    def backward(residuals: Any, g: Any) -> tuple[Any, None, Any]:
        x, weight, trained = residuals
        if isinstance(g, SymbolicZero):
            return None, None, None
        is_integer = jnp.issubdtype(x.dtype, jnp.integer)
        x_gradient = None if is_integer else jax.vjp(lambda x: run(x, weight), x)[1](g)[0]
        return x_gradient, None, None if trained is None else norm(x, g)

    probed_run.defvjp(forward, backward, symbolic_zeros=True)
    return probed_run


@jax.custom_vjp
def attach_probe(leaf: jax.Array, probe: jax.Array) -> jax.Array:
    """`leaf`, which gives `probe` its squared gradient norm and gets no gradient itself."""
    del probe
    return leaf


def _backward(_: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(g), jnp.square(g.astype(jnp.float32)).sum()


attach_probe.defvjp(lambda leaf, probe: (leaf, None), _backward)
