"""A traced function as a flat list of equations, any part of which can be run by itself.

    trace = trace_equations(function, x)         # jit and checkpoint equations are inlined
    run_equations(trace.equations, {trace.inputs[0]: array})

`Value` stands for an array between equations. Two traces are joined by giving the second one the first one's values as
inputs. Public JAX only: `jax.make_jaxpr` and the equations it returns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, jaxpr_as_fun

# Equations that only call another trace, and the parameter that holds it: they are inlined, so that parts can be run.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}


@dataclass(eq=False)
class Value:
    """An array of the program: an input, a constant, or the output of an equation."""

    aval: Any  # shape and dtype
    producer: "Equation | None" = None
    constant: Any = None  # the array, if it is known while tracing

    @property
    def is_constant(self) -> bool:
        """Whether the array is known while tracing."""
        return self.producer is None and self.constant is not None


@dataclass(eq=False)
class Equation:
    """One primitive applied to values."""

    name: str  # of the primitive
    call: Callable[..., list[Any]]  # input arrays -> output arrays
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """A function's equations in order, its inputs and its outputs."""

    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Value]


def trace_equations(function: Callable[..., Any], *avals: Any, inputs: list[Value] | None = None) -> Trace:
    """The flat trace of `function` on flat arrays shaped like `avals`; `inputs`, if given, are the values it reads."""
    closed = jax.make_jaxpr(function)(*avals)
    inputs = [Value(var.aval) for var in closed.jaxpr.invars] if inputs is None else inputs
    equations: list[Equation] = []
    constants = [Value(jax.typeof(constant), constant=constant) for constant in closed.consts]
    return Trace(inputs, equations, append_equations(closed.jaxpr, constants, inputs, equations))


def append_equations(
    jaxpr: Jaxpr, constants: list[Value], inputs: list[Value], equations: list[Equation]
) -> list[Value]:
    """Append the equations of `jaxpr`, called on `inputs`, to `equations`; returns the values of its results."""
    values: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def value_of(atom: Any) -> Value:
        return Value(atom.aval, constant=atom.val) if isinstance(atom, Literal) else values[atom]

    for source in jaxpr.eqns:
        arguments = [value_of(atom) for atom in source.invars]
        inner = source.params.get(CALLS.get(source.primitive.name, ""))
        if inner is None:
            equation = Equation(source.primitive.name, equation_function(source, jaxpr), arguments)
            equation.outputs = [Value(var.aval, producer=equation) for var in source.outvars]
            equations.append(equation)
            results = equation.outputs
        else:
            body, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            inner_constants = [Value(jax.typeof(constant), constant=constant) for constant in consts]
            results = append_equations(body, inner_constants, arguments, equations)
        values |= dict(zip(source.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def equation_function(source: Any, jaxpr: Jaxpr) -> Callable[..., list[Any]]:
    """The equation `source` of `jaxpr` as a function of everything it reads, literals too."""
    variables = list(dict.fromkeys(atom for atom in source.invars if not isinstance(atom, Literal)))
    positions = [None if isinstance(atom, Literal) else variables.index(atom) for atom in source.invars]
    used = [number for number, var in enumerate(source.outvars) if not isinstance(var, DropVar)]
    single = jaxpr.replace(
        constvars=[], invars=variables, outvars=[source.outvars[n] for n in used], eqns=[source], effects=source.effects
    )
    function = jaxpr_as_fun(ClosedJaxpr(single, ()))

    def call(*arrays: Any) -> list[Any]:
        by_position = {position: array for position, array in zip(positions, arrays, strict=True)
                       if position is not None}  # fmt: skip
        results = function(*(by_position[position] for position in range(len(variables))))
        outputs = dict(zip(used, results, strict=True))
        return [outputs.get(number) for number in range(len(source.outvars))]

    return call


def run_equations(equations: Iterable[Equation], arrays: dict[Value, Any]) -> dict[Value, Any]:
    """`arrays` and the outputs of `equations`, run in order."""
    arrays = dict(arrays)
    for equation in equations:
        outputs = equation.call(*(array_of(value, arrays) for value in equation.inputs))
        arrays |= dict(zip(equation.outputs, outputs, strict=True))
    return arrays


def array_of(value: Value, arrays: dict[Value, Any]) -> Any:
    """The array that `value` stands for."""
    return value.constant if value.is_constant else arrays[value]
