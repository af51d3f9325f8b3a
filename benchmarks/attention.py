"""`meshwright bench attention`: time and temporary memory of attention implementations, next to JAX's own.

`long` is the gradient at 8192 tokens, where memory matters; `short` is the shape at which a small model trains, where
time does. On a GPU in bfloat16 cuDNN's attention is measured too. The compiler reports the temporaries.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models.attention.interface import Mask, TokenIndices, attend
from ..models.attention.registry import IMPLEMENTATIONS
from .harness import bench_parser, run_in_turns


class Shape(NamedTuple):
    """The shape of a causal attention."""

    batch: int
    tokens: int
    heads: int
    head_dim: int


SHAPES = {"long": Shape(1, 8192, 4, 64), "short": Shape(8, 512, 8, 64)}


def run(shapes: dict[str, Shape] = SHAPES, *, dtype: str = "float32", repeats: int = 5) -> dict:
    """{shape name: {implementation: {milliseconds, temporary_megabytes, speed_against_dense}}}.

    Milliseconds are the median of `repeats` gradients, in turns; megabytes (1e6 bytes) are the temporaries of the
    compiled gradient.
    """
    return {name: _measure(shape, dtype, repeats) for name, shape in shapes.items()}


def main(arguments: Sequence[str] = ()) -> dict:
    """Measure SHAPES, print the table, return what `run` returns."""
    parser = bench_parser("attention", __doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    results = run(dtype=options.dtype, repeats=options.repeats)
    for name, measured in results.items():
        batch, tokens, heads, head_dim = SHAPES[name]
        device = jax.devices()[0].device_kind
        shape = f"{batch} x {tokens} tokens, {heads} x {head_dim} heads"
        print(f"gradient of causal attention, {shape}, {options.dtype}, {device}")
        for implementation, row in measured.items():
            print(
                f"  {implementation:10} {row['milliseconds']:9.1f} ms  {row['speed_against_dense']:5.2f}x dense"
                f"  {row['temporary_megabytes']:8.1f} MB of temporaries"
            )
    return results


def _measure(shape: Shape, dtype: str, repeats: int) -> dict[str, dict[str, float]]:
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape), dtype)
    compiled = {name: _gradient(f).lower(q, k, v).compile() for name, f in _implementations(q).items()}

    def seconds(gradient: Callable) -> float:
        start = time.perf_counter()
        jax.block_until_ready(gradient(q, k, v))
        return time.perf_counter() - start

    runs = {name: partial(seconds, gradient) for name, gradient in compiled.items()}
    median = {name: statistics.median(times) for name, times in run_in_turns(runs, rounds=repeats).items()}
    return {
        name: {
            "milliseconds": 1e3 * median[name],
            "temporary_megabytes": gradient.memory_analysis().temp_size_in_bytes / 1e6,
            "speed_against_dense": median["dense"] / median[name],
        }
        for name, gradient in compiled.items()
    }


def _implementations(q) -> dict[str, Callable]:
    platform = jax.default_backend()
    supported = {
        name: partial(_attend, implementation)
        for name, implementation in IMPLEMENTATIONS.items()
        if not implementation.refuse(Mask(), TokenIndices(), q, q, platform)
    }
    return {**supported, "jax.nn": partial(jax.nn.dot_product_attention, is_causal=True)}


def _attend(implementation, q, k, v):
    return attend(implementation, q, k, v, Mask())


def _gradient(attention: Callable):
    # Squared, so that the gradient depends on the output.
    return jax.jit(jax.grad(lambda q, k, v: jnp.sum(jnp.square(attention(q, k, v))), argnums=(0, 1, 2)))
