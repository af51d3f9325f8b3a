"""One block's backward pass in two parts: I, the gradient of its input, and W, the gradient of its weights.

Only I is on the critical path of a pipeline; W may wait until the device would be idle. Both are parts of one trace,

    forward:   y = block(x)            I:  dx from dy            W:  dw from what remains

so no product is computed twice, under any memory policy. What a later part reads of an earlier one is *saved*, in lists
of different lifetimes:

    saved.input    made by the forward pass, read by I only         lives from F to I
    saved.weight   made by the forward pass, read by W              lives from F to W
    saved.stash    made by I, read by W                             lives from I to W

What costs nothing (reshapes, casts to a wider type) or does not depend on x (masks, casts of weights) is not saved but
computed again. What the memory policy offloads is saved in host memory, and each part that reads it fetches it.

Split a single block, never a stage: a scanned stage's backward pass is a single equation.
Source: Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from .equations import Equation, Trace, Value, array_of, run_equations, trace_equations
from .slot_pools import on_host, total_bytes

# Equations that never move from W to I.
EXPENSIVE = {"dot_general", "conv_general_dilated", "scan", "while", "cond", "shard_map", "custom_vjp_call"}
# Equations that move or repeat numbers: computed again where they are read, so that one copy is saved and not two.
SHAPING = {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "copy"}


class SavedValues(NamedTuple):
    """Lists of arrays (or pools, or shapes) between the parts of a block, by lifetime."""

    input: list[Any]
    weight: list[Any]
    stash: list[Any]


@dataclass(frozen=True)
class BackwardSplit:
    """A block in parts, as functions."""

    forward: Callable[..., tuple[Any, list[Any], list[Any]]]  # w, frozen, context, x -> y, saved.input, saved.weight
    input_gradient: Callable[..., tuple[Any, list[Any]]]  # w, frozen, context, saved, dy -> dx, saved.stash
    weight_gradient: Callable[..., Any]  # w, frozen, context, saved -> dw, like w
    backward: Callable[..., tuple[Any, Any]]  # w, frozen, context, saved, dy -> dx, dw: both parts at once
    shapes: SavedValues  # with dtypes and memory spaces


@dataclass(frozen=True)
class Part:
    """Equations to run, in order, and the values that they read of an earlier part."""

    equations: list[Equation]
    reads: list[Value]

    @property
    def saved_bytes(self) -> int:
        """Bytes that wait for the part, on the device or in host memory."""
        return total_bytes(value.aval for value in self.reads)

    @property
    def expensive_count(self) -> int:
        """Number of expensive equations that the part runs."""
        return sum(equation.name in EXPENSIVE for equation in self.equations)


def split_backward(
    block: Callable[[Any, Any, Any, Any], Any], weights: Any, frozen: Any, context: Any, x: Any
) -> BackwardSplit:
    """Split `block(weights, frozen, context, x) -> y`, traced on shapes of its arguments; y is shaped like x.

    `weights` have a gradient, `frozen` and `context` have none.
    """
    arguments, tree = jax.tree.flatten((weights, frozen, context, x))
    pull_trees = []

    def forward(*flat: Any) -> list[Any]:
        weights, frozen, context, x = jax.tree.unflatten(tree, flat)
        y, pull = jax.vjp(lambda weights, x: block(weights, frozen, context, x), weights, x)
        residuals, pull_tree = jax.tree.flatten(pull)
        pull_trees.append(pull_tree)
        return [y, *residuals]

    forward_trace = trace_equations(forward, *arguments)

    def backward(dy: Any, *residuals: Any) -> list[Any]:
        weight_gradient, dx = jax.tree.unflatten(pull_trees[0], residuals)(dy)
        return [dx, *jax.tree.leaves(weight_gradient)]

    y, *residuals = forward_trace.outputs
    inputs = [Value(y.aval), *residuals]
    backward_trace = trace_equations(backward, *(value.aval for value in inputs), inputs=inputs)
    return assemble_split(forward_trace, backward_trace, weights_tree=jax.tree.structure(weights))


def assemble_split(forward_trace: Trace, backward_trace: Trace, *, weights_tree: Any) -> BackwardSplit:
    """The parts as functions; `weights_tree` is the tree structure of the weights and their gradient."""
    y, (dy, *_), (dx, *dw) = forward_trace.outputs[0], backward_trace.inputs, backward_trace.outputs
    *outside, x = forward_trace.inputs  # `outside`: weights, frozen and context, arguments of every part
    varying = dependents({x, dy}, [*forward_trace.equations, *backward_trace.equations])
    available = {*outside, dy}
    fused = select_part([dx, *dw], backward_trace.equations, available=available, varying=varying)
    i_part, w_part = split_equations(dx, dw, backward_trace.equations, available=available, dy=dy, varying=varying)
    produced = {value for equation in i_part.equations for value in equation.outputs} | {dy}
    weight = [value for value in w_part.reads if value not in produced]
    stash = [value for value in w_part.reads if value in produced]
    only_input = [value for value in i_part.reads if value not in set(weight)]

    def bind(*arguments: Any) -> dict[Value, Any]:
        return dict(zip(outside, jax.tree.leaves(arguments), strict=True))

    def bind_saved(weights: Any, frozen: Any, context: Any, saved: SavedValues) -> dict[Value, Any]:
        arrays = bind(weights, frozen, context)
        for values, saved_arrays in zip((only_input, weight, stash), saved, strict=True):
            arrays |= dict(zip(values, saved_arrays, strict=False))  # a list that the part does not read is empty
        return arrays

    def read(values: list[Value], arrays: dict[Value, Any]) -> list[Any]:
        return [array_of(value, arrays) for value in values]

    def forward(weights: Any, frozen: Any, context: Any, x_array: Any) -> tuple[Any, list[Any], list[Any]]:
        arrays = run_equations(forward_trace.equations, bind(weights, frozen, context) | {x: x_array})
        return array_of(y, arrays), read(only_input, arrays), read(weight, arrays)

    def input_gradient(
        weights: Any, frozen: Any, context: Any, saved: SavedValues, dy_array: Any
    ) -> tuple[Any, list[Any]]:
        arrays = run_equations(i_part.equations, bind_saved(weights, frozen, context, saved) | {dy: dy_array})
        return array_of(dx, arrays), read(stash, arrays)

    def weight_gradient(weights: Any, frozen: Any, context: Any, saved: SavedValues) -> Any:
        arrays = run_equations(w_part.equations, bind_saved(weights, frozen, context, saved))
        return jax.tree.unflatten(weights_tree, read(dw, arrays))

    def backward(weights: Any, frozen: Any, context: Any, saved: SavedValues, dy_array: Any) -> tuple[Any, Any]:
        arrays = run_equations(fused.equations, bind_saved(weights, frozen, context, saved) | {dy: dy_array})
        return array_of(dx, arrays), jax.tree.unflatten(weights_tree, read(dw, arrays))

    shapes = SavedValues(*([value.aval for value in values] for values in (only_input, weight, stash)))
    return BackwardSplit(forward, input_gradient, weight_gradient, backward, shapes)


def split_equations(
    dx: Value, dw: list[Value], equations: list[Equation], *, available: set[Value], dy: Value, varying: set[Value]
) -> tuple[Part, Part]:
    """I and W. Cheap equations move from W to I where W then has less to read: a product instead of both factors."""

    def parts_with(early: list[Value]) -> tuple[Part, Part]:
        i_part = select_part([dx, *early], equations, available=available, varying=varying)
        produced = {value for equation in i_part.equations for value in equation.outputs} | {dy}
        return i_part, select_part(dw, equations, available=available - {dy}, varying=varying, produced=produced)

    early: list[Value] = []
    best = parts_with(early)
    for equation in best[1].equations:
        if equation.name in EXPENSIVE:
            continue
        parts = parts_with([*early, *equation.outputs])
        if parts[1].saved_bytes < best[1].saved_bytes and parts[0].expensive_count == best[0].expensive_count:
            early, best = [*early, *equation.outputs], parts
    return best


def dependents(sources: set[Value], equations: list[Equation]) -> set[Value]:
    """`sources` and every output of `equations` that depends on them."""
    values = set(sources)
    for equation in equations:
        if not values.isdisjoint(equation.inputs):
            values.update(equation.outputs)
    return values


def select_part(
    targets: Collection[Value],
    equations: list[Equation],
    *,
    available: set[Value],
    varying: set[Value],
    produced: Collection[Value] = (),
) -> Part:
    """The equations that compute `targets` out of `equations` and `available` values, and what they read.

    An equation of an earlier part, one that is not among `equations` or whose outputs are in `produced`, is run again
    if that is free (`is_free`) or none of its inputs is `varying`; otherwise its output is read.
    """
    current = set(equations)
    selected: dict[Equation, None] = {}  # in an order that may be run
    reads: dict[Value, None] = {}
    visited: set[Value] = set()

    def visit(value: Value) -> None:
        if value in visited or value.is_constant or value in available:
            return
        visited.add(value)
        producer = value.producer
        earlier = producer not in current or value in produced
        if producer is None or (earlier and value in varying and not is_free(producer)):
            reads[value] = None
            return
        for source in producer.inputs:
            visit(source)
        selected[producer] = None

    for target in targets:
        visit(target)
    return Part(list(selected), list(reads))


def is_free(equation: Equation) -> bool:
    """Whether to compute its output again rather than save it: it moves numbers, or writes them in a wider type.

    Moves from host memory are free too: every part fetches for itself what it reads.
    """
    if equation.name == "device_put":
        return on_host(equation.inputs[0].aval)
    if equation.name == "convert_element_type":
        before, after = (value.aval.dtype.itemsize for value in (equation.inputs[0], equation.outputs[0]))
        return after >= before
    return equation.name in SHAPING and len(equation.inputs) == 1
