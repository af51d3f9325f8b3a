"""What a traced function will do, read off its jaxpr before anything is compiled: equations, names, matrix products.

    for equation, times in equations(jax.make_jaxpr(f)(x)): ...

The counts are those of the program as written, for all devices together; unlike a compiler's own estimate, which counts
the body of a loop once, they multiply loops through.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def equations(jaxpr: Any) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Every equation of `jaxpr` (closed or not) and of the functions it calls, with how often it runs.

    Bodies of `scan` count `length` times, of `shard_map` once a device along the axes it took, branches of `cond` and
    bodies of `while` once each. Functions not yet differentiated (`custom_vjp`) are read as they are called.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation, 1
        times = run_count(equation)
        for value in inner_jaxprs(equation):
            yield from ((found, count * times) for found, count in equations(value))


def inner_jaxprs(equation: core.JaxprEqn) -> Iterator[Any]:
    """The jaxprs among the parameters of `equation`, branches one by one."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                yield each


def run_count(equation: core.JaxprEqn) -> int:
    """How often the body of `equation` runs."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        mesh = equation.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def host_bytes(jaxpr: Any) -> int:
    """Bytes in host memory, of all devices together: every array that is made there.

    An array that a loop fills piece by piece counts once, as a whole; its pieces, and whatever else an equation that
    already holds one makes of it, do not.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if any(is_on_host(var.aval) for var in equation.invars):
            continue
        made = [var.aval for var in equation.outvars if is_on_host(var.aval)]
        total += sum(math.prod(one.shape) * one.dtype.itemsize for one in made)
        if not made:  # the rounds of a loop follow each other, the devices of a shard_map do not
            times = run_count(equation) if equation.primitive.name == "shard_map" else 1
            total += times * sum(map(host_bytes, inner_jaxprs(equation)))
    return total


def is_on_host(aval: Any) -> bool:
    """Whether an array lives in host memory."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def checkpoint_names(jaxpr: Any) -> list[str]:
    """Names given by `checkpoint_name`, in order of first appearance."""
    found = [equation.params["name"] for equation, _ in equations(jaxpr) if equation.primitive.name == "name"]
    return list(dict.fromkeys(found))


def matmul_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products: 2 x rows x columns x contracted."""
    return sum(dot_flops(eqn) * times for eqn, times in equations(jaxpr) if eqn.primitive.name == "dot_general")


def dot_flops(equation: core.JaxprEqn) -> int:
    """Of one `dot_general`."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dimension] for dimension in contracted)
