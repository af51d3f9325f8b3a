"""Statistics of a traced function, from its jaxpr before compilation: equations, names, matrix products, host memory.

    for equation, times in equations(jax.make_jaxpr(f)(x)): ...

The counts are for all devices together. The body of a loop counts once per iteration, unlike in the estimate of a
compiler, which counts it once.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def equations(jaxpr: Any) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Yield every equation of `jaxpr` (closed or not) and of the functions that it calls, with how often it runs.

    The body of a `scan` counts `length` times, that of a `shard_map` once per device along its manual axes, branches of
    `cond` and bodies of `while` once. `custom_vjp` functions are read as they are called.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation, 1
        times = run_count(equation)
        for value in inner_jaxprs(equation):
            yield from ((inner, count * times) for inner, count in equations(value))


def inner_jaxprs(equation: core.JaxprEqn) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of `equation`, each branch by itself."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield item


def run_count(equation: core.JaxprEqn) -> int:
    """Return how often the body of `equation` runs."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        mesh = equation.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def host_bytes(jaxpr: Any) -> int:
    """Return the bytes of all arrays that are created in host memory, for all devices together.

    An array that a loop fills part by part counts once. The results of an equation that reads a host array do not
    count, because they are updates or parts of it.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if any(is_on_host(var.aval) for var in equation.invars):
            continue
        created = [var.aval for var in equation.outvars if is_on_host(var.aval)]
        total += sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in created)
        if not created:  # iterations of a loop run one after the other, devices of a shard_map at the same time
            times = run_count(equation) if equation.primitive.name == "shard_map" else 1
            total += times * sum(map(host_bytes, inner_jaxprs(equation)))
    return total


def is_on_host(aval: Any) -> bool:
    """Return whether an array is in host memory."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def checkpoint_names(jaxpr: Any) -> list[str]:
    """Return the names given by `checkpoint_name`, in order of first appearance."""
    names = (equation.params["name"] for equation, _ in equations(jaxpr) if equation.primitive.name == "name")
    return list(dict.fromkeys(names))


def matmul_flops(jaxpr: Any) -> int:
    """Return the floating-point operations of all matrix products: 2 x rows x columns x contracted size."""
    return sum(dot_flops(eqn) * times for eqn, times in equations(jaxpr) if eqn.primitive.name == "dot_general")


def dot_flops(equation: core.JaxprEqn) -> int:
    """Return the floating-point operations of one `dot_general`."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dimension] for dimension in contracted)
