"""A traced function as a flat list of equations, of which any part can be run on its own.

    program = traced(function, x)                # jit and checkpoint equations are opened
    run(program.equations, {program.inputs[0]: array})

`Value` stands for an array between equations. Two traces are joined by giving the second one the first one's values as
inputs. Public JAX only: `jax.make_jaxpr` and the equations it returns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, jaxpr_as_fun

# Equations that only call another trace: they are opened, so that parts of them can be run.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}


@dataclass(eq=False)
class Value:
    """An array of the program: an input, a constant, or what an equation made."""

    aval: Any  # shape and dtype
    maker: "Equation | None" = None
    constant: Any = None  # the array, where it is known while tracing

    @property
    def known(self) -> bool:
        """Whether it is a constant."""
        return self.maker is None and self.constant is not None


@dataclass(eq=False)
class Equation:
    """One primitive applied to values."""

    name: str  # of the primitive
    call: Callable[..., list[Any]]  # its outputs for arrays in the inputs' places
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """A function's equations in order, and the values they begin and end with."""

    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Value]


def traced(function: Callable[..., Any], *avals: Any, inputs: list[Value] | None = None) -> Trace:
    """The flat trace of `function` on flat arrays shaped like `avals`; `inputs` are the values to begin with."""
    closed = jax.make_jaxpr(function)(*avals)
    inputs = [Value(var.aval) for var in closed.jaxpr.invars] if inputs is None else inputs
    equations: list[Equation] = []
    outputs = opened(closed.jaxpr, [Value(jax.typeof(c), constant=c) for c in closed.consts], inputs, equations)
    return Trace(inputs, equations, outputs)


def opened(jaxpr: Jaxpr, constants: list[Value], inputs: list[Value], equations: list[Equation]) -> list[Value]:
    """Append the equations of `jaxpr`, called on `inputs`, to `equations`; the values of its results."""
    known: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def value(atom: Any) -> Value:
        return Value(atom.aval, constant=atom.val) if isinstance(atom, Literal) else known[atom]

    for source in jaxpr.eqns:
        arguments = [value(atom) for atom in source.invars]
        inner = source.params.get(CALLS.get(source.primitive.name, ""))
        if inner is None:
            equation = Equation(source.primitive.name, alone(source, jaxpr), arguments)
            equation.outputs = [Value(var.aval, maker=equation) for var in source.outvars]
            equations.append(equation)
            results = equation.outputs
        else:
            called, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            results = opened(called, [Value(jax.typeof(c), constant=c) for c in consts], arguments, equations)
        known |= dict(zip(source.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def alone(source: Any, jaxpr: Jaxpr) -> Callable[..., list[Any]]:
    """The one equation `source` of `jaxpr` as a function of everything it reads, literals too."""
    names = list(dict.fromkeys(atom for atom in source.invars if not isinstance(atom, Literal)))
    places = [None if isinstance(atom, Literal) else names.index(atom) for atom in source.invars]
    kept = [number for number, var in enumerate(source.outvars) if not isinstance(var, DropVar)]
    own = jaxpr.replace(
        constvars=[], invars=names, outvars=[source.outvars[n] for n in kept], eqns=[source], effects=source.effects
    )
    function = jaxpr_as_fun(ClosedJaxpr(own, ()))

    def call(*arrays: Any) -> list[Any]:
        first = {place: array for place, array in zip(places, arrays, strict=True) if place is not None}
        made = dict(zip(kept, function(*(first[place] for place in range(len(names)))), strict=True))
        return [made.get(number) for number in range(len(source.outvars))]

    return call


def run(equations: Iterable[Equation], arrays: dict[Value, Any]) -> dict[Value, Any]:
    """`arrays` and everything that `equations`, in order, make of them."""
    arrays = dict(arrays)
    for equation in equations:
        made = equation.call(*(read(value, arrays) for value in equation.inputs))
        arrays |= dict(zip(equation.outputs, made, strict=True))
    return arrays


def read(value: Value, arrays: dict[Value, Any]) -> Any:
    """The array that `value` stands for."""
    return value.constant if value.known else arrays[value]
