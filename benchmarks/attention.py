"""What attention costs, each number beside a reference of the same process: time in turns, temporaries by the compiler.

`long` is the gradient at 8192 tokens, where memory decides; `short` the shape a small model trains at, where time does.
JAX's own `dot_product_attention` is measured with them, and cuDNN's on a GPU in bfloat16: `meshwright bench attention`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models.attention.interface import Mask, TokenIndices, attend
from ..models.attention.registry import IMPLEMENTATIONS


class Shape(NamedTuple):
    """One measured attention, causal."""

    batch: int
    tokens: int
    heads: int
    head_dim: int


SHAPES = {"long": Shape(1, 8192, 4, 64), "short": Shape(8, 512, 8, 64)}


def run(shapes: dict[str, Shape] = SHAPES, *, dtype: str = "float32", repeats: int = 5) -> dict:
    """{shape name: {implementation: {milliseconds, temporary_megabytes, speed_against_dense}}}.

    Milliseconds are the median of `repeats` gradients, the implementations taking turns, so that a busy machine slows
    all of them; megabytes (1e6 bytes) are the compiled gradient's temporaries.
    """
    return {name: _measure(shape, dtype, repeats) for name, shape in shapes.items()}


def main(arguments: Sequence[str] = ()) -> dict:
    """Measure SHAPES, print the table, return what `run` returns."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    dtype = options.dtype
    results = run(dtype=dtype, repeats=options.repeats)
    for name, measured in results.items():
        batch, tokens, heads, head_dim = SHAPES[name]
        device = jax.devices()[0].device_kind
        print(f"gradient of causal attention, {batch} x {tokens} tokens, {heads} x {head_dim} heads, {dtype}, {device}")
        for implementation, row in measured.items():
            print(
                f"  {implementation:10} {row['milliseconds']:9.1f} ms  {row['speed_against_dense']:5.2f}x dense"
                f"  {row['temporary_megabytes']:8.1f} MB of temporaries"
            )
    return results


def _measure(shape: Shape, dtype: str, repeats: int) -> dict[str, dict[str, float]]:
    batch, tokens, heads, head_dim = shape
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, tokens, heads, head_dim), dtype)
    compiled = {name: _gradient(f).lower(q, k, v).compile() for name, f in _contestants(q).items()}
    seconds = {name: [] for name in compiled}
    for turn in range(repeats + 1):
        for name, gradient in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(q, k, v))
            if turn:  # the first touches fresh memory
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "milliseconds": 1e3 * median[name],
            "temporary_megabytes": gradient.memory_analysis().temp_size_in_bytes / 1e6,
            "speed_against_dense": median["dense"] / median[name],
        }
        for name, gradient in compiled.items()
    }


def _contestants(q) -> dict[str, Callable]:
    platform = jax.default_backend()
    ours = {
        name: partial(_attend, implementation)
        for name, implementation in IMPLEMENTATIONS.items()
        if not implementation.refuse(Mask(), TokenIndices(), q, q, platform)
    }
    return {**ours, "jax.nn": partial(jax.nn.dot_product_attention, is_causal=True)}


def _attend(implementation, q, k, v):
    return attend(implementation, q, k, v, Mask())


def _gradient(attention: Callable):
    # Squared, so that the output is needed and its gradient is not a constant.
    return jax.jit(jax.grad(lambda q, k, v: jnp.sum(jnp.square(attention(q, k, v))), argnums=(0, 1, 2)))


if __name__ == "__main__":
    main()
