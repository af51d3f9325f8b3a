"""One block's backward pass in two halves: I, the gradient of its input, and W, the gradient of its weights.

Only I is on the critical path of a pipeline; W may wait and fill what would be idle. Both are parts of one trace,

    forward:   y = block(x)            I:  dx from dy            W:  dw from what is left

so that no product is computed twice, under any memory policy. What a later part reads of an earlier one is *saved*, and
when it may be forgotten differs:

    saved.input    made by the forward pass, read by I only         lives from F to I
    saved.weight   made by the forward pass, read by W              lives from F to W
    saved.stash    made by I, read by W                             lives from I to W

What costs nothing (reshapes, casts to a wider type) or does not depend on x (masks, casts of weights) is not saved but
made again. What the memory policy offloads is saved in host memory, and each part that reads it fetches it.

Split a single block, never a stage: a scanned stage's backward pass is a single equation.
Source: Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from .equations import Equation, Trace, Value, read, run, traced
from .slot_pools import on_host, size

# Equations that never move from W to I.
HEAVY = {"dot_general", "conv_general_dilated", "scan", "while", "cond", "shard_map", "custom_vjp_call"}
# Equations that move or repeat numbers: made again where they are read, so that one copy is saved and not two.
SHAPING = {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "copy"}


class Saved(NamedTuple):
    """Lists of arrays (or pools, or shapes) between the parts of a block, by how long they live."""

    input: list[Any]
    weight: list[Any]
    stash: list[Any]


@dataclass(frozen=True)
class Split:
    """A block in parts. `arguments` is (weights, frozen, context, x) with x None in the backward parts."""

    forward: Callable[..., tuple[Any, list[Any], list[Any]]]  # w, frozen, context, x -> y, saved.input, saved.weight
    input_gradient: Callable[..., tuple[Any, list[Any]]]  # w, frozen, context, saved, dy -> dx, saved.stash
    weight_gradient: Callable[..., Any]  # w, frozen, context, saved -> dw, like w
    backward: Callable[..., tuple[Any, Any]]  # w, frozen, context, saved, dy -> dx, dw: both parts at once
    shapes: Saved  # with dtypes, and in which memory


@dataclass(frozen=True)
class Part:
    """Equations to run, in order, and what they read that an earlier part made."""

    equations: list[Equation]
    reads: list[Value]


def split(block: Callable[[Any, Any, Any, Any], Any], weights: Any, frozen: Any, context: Any, x: Any) -> Split:
    """Split `block(weights, frozen, context, x) -> y`, traced on shapes of its arguments; y is shaped like x.

    `weights` are differentiated, `frozen` and `context` are not.
    """
    given, tree = jax.tree.flatten((weights, frozen, context, x))
    made = []

    def forward(*flat: Any) -> list[Any]:
        weights, frozen, context, x = jax.tree.unflatten(tree, flat)
        y, pull = jax.vjp(lambda weights, x: block(weights, frozen, context, x), weights, x)
        residuals, pull_tree = jax.tree.flatten(pull)
        made.append(pull_tree)
        return [y, *residuals]

    ahead = traced(forward, *given)

    def backward(dy: Any, *residuals: Any) -> list[Any]:
        weight_gradient, dx = jax.tree.unflatten(made[0], residuals)(dy)
        return [dx, *jax.tree.leaves(weight_gradient)]

    y, *residuals = ahead.outputs
    dy = Value(y.aval)
    back = traced(backward, *(value.aval for value in (dy, *residuals)), inputs=[dy, *residuals])
    return assembled(ahead, back, given=(weights, frozen, context, x))


def assembled(ahead: Trace, back: Trace, *, given: tuple[Any, Any, Any, Any]) -> Split:
    """The parts as functions, out of the forward and the backward trace; `given` are the shapes that were traced."""
    y, (dy, *_), (dx, *dw) = ahead.outputs[0], back.inputs, back.outputs
    x, outside = ahead.inputs[-1], ahead.inputs[:-1]  # weights, frozen and context are at hand in every part
    varying = depending_on({x, dy}, [*ahead.equations, *back.equations])
    at_hand = {*outside, dy}
    both = needed([dx, *dw], back.equations, at_hand=at_hand, varying=varying)
    first, second = halves(dx, dw, back.equations, at_hand=at_hand, dy=dy, varying=varying)
    made = {value for equation in first.equations for value in equation.outputs} | {dy}
    weight = [value for value in second.reads if value not in made]
    stash = [value for value in second.reads if value in made]
    only_input = [value for value in first.reads if value not in set(weight)]
    dw_tree = jax.tree.structure(given[0])

    def start(arguments: tuple[Any, ...]) -> dict[Value, Any]:
        return dict(zip(outside, jax.tree.leaves(arguments), strict=True))

    def forward(weights: Any, frozen: Any, context: Any, x_array: Any) -> tuple[Any, list[Any], list[Any]]:
        arrays = run(ahead.equations, start((weights, frozen, context)) | {x: x_array})
        return read(y, arrays), [read(value, arrays) for value in only_input], [read(value, arrays) for value in weight]

    def again(weights: Any, frozen: Any, context: Any, saved: Saved) -> dict[Value, Any]:
        arrays = start((weights, frozen, context))
        for values, given in zip((only_input, weight, stash), saved, strict=True):
            arrays |= dict(zip(values, given, strict=False))  # a part is given the lists it reads
        return arrays

    def input_gradient(weights: Any, frozen: Any, context: Any, saved: Saved, dy_array: Any) -> tuple[Any, list[Any]]:
        arrays = run(first.equations, again(weights, frozen, context, saved) | {dy: dy_array})
        return read(dx, arrays), [read(value, arrays) for value in stash]

    def weight_gradient(weights: Any, frozen: Any, context: Any, saved: Saved) -> Any:
        arrays = run(second.equations, again(weights, frozen, context, saved))
        return jax.tree.unflatten(dw_tree, [read(value, arrays) for value in dw])

    def backward(weights: Any, frozen: Any, context: Any, saved: Saved, dy_array: Any) -> tuple[Any, Any]:
        arrays = run(both.equations, again(weights, frozen, context, saved) | {dy: dy_array})
        return read(dx, arrays), jax.tree.unflatten(dw_tree, [read(value, arrays) for value in dw])

    shapes = Saved(*([value.aval for value in values] for values in (only_input, weight, stash)))
    return Split(forward, input_gradient, weight_gradient, backward, shapes)


def halves(
    dx: Value, dw: list[Value], equations: list[Equation], *, at_hand: set[Value], dy: Value, varying: set[Value]
) -> tuple[Part, Part]:
    """I and W. Cheap equations move from W to I where W then has less to read: a product instead of both factors."""

    def cut(early: list[Value]) -> tuple[Part, Part]:
        first = needed([dx, *early], equations, at_hand=at_hand, varying=varying)
        made = {value for equation in first.equations for value in equation.outputs} | {dy}
        return first, needed(dw, equations, at_hand=at_hand - {dy}, varying=varying, made=made)

    early: list[Value] = []
    best = cut(early)
    for equation in best[1].equations:
        if equation.name in HEAVY:
            continue
        other = cut([*early, *equation.outputs])
        if waiting(other[1]) < waiting(best[1]) and heavy(other[0]) == heavy(best[0]):
            early, best = [*early, *equation.outputs], other
    return best


def waiting(part: Part) -> int:
    """Bytes that wait for the part, on the device or in host memory."""
    return size(value.aval for value in part.reads)


def heavy(part: Part) -> int:
    """How many costly equations the part runs."""
    return sum(equation.name in HEAVY for equation in part.equations)


def depending_on(sources: set[Value], equations: list[Equation]) -> set[Value]:
    """`sources` and everything that `equations` make of them."""
    found = set(sources)
    for equation in equations:
        if not found.isdisjoint(equation.inputs):
            found.update(equation.outputs)
    return found


def needed(
    targets: Collection[Value],
    equations: list[Equation],
    *,
    at_hand: set[Value],
    varying: set[Value],
    made: Collection[Value] = (),
) -> Part:
    """What a part must run and read to make `targets` out of `equations` and what is `at_hand`.

    An equation of an earlier part, one that is not among `equations` or whose outputs are in `made`, is run again where
    that is free (`free`) or nothing `varying` goes into it; otherwise what it made is read.
    """
    own = set(equations)
    chosen: dict[Equation, None] = {}  # in an order that may be run
    reads: dict[Value, None] = {}
    done: set[Value] = set()

    def visit(value: Value) -> None:
        if value in done or value.known or value in at_hand:
            return
        done.add(value)
        maker = value.maker
        earlier = maker is None or maker not in own or value in made
        if maker is None or (earlier and value in varying and not free(maker)):
            reads[value] = None
            return
        for source in maker.inputs:
            visit(source)
        chosen[maker] = None

    for target in targets:
        visit(target)
    return Part(list(chosen), list(reads))


def free(equation: Equation) -> bool:
    """Whether to make its output again rather than keep it: it moves numbers, or writes them in a wider type.

    Moves from host memory too: every part fetches for itself what it reads.
    """
    if equation.name == "device_put":
        return on_host(equation.inputs[0].aval)
    if equation.name == "convert_element_type":
        before, after = (value.aval.dtype.itemsize for value in (equation.inputs[0], equation.outputs[0]))
        return after >= before
    return equation.name in SHAPING and len(equation.inputs) == 1
