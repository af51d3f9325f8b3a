"""An outer optimizer whose replicas are in programs of their own: a meeting in two halves, with the network between.

The optimizer itself is the one of the mesh. It is traced twice, with one replica and two exchanges that send nothing:
the first writes down what the optimizer would send, the second hands it what came.

    halves = apart(build, "meet", per_replica=...)
    letters = halves.outgoing(params, outer)                        coded, to be sent
    params, outer = halves.incoming(params, outer, arrived)         arrived: float32, one tree a letter

What is sent are the raw bytes of the codes, in the order of the tree: both ends have the same configuration.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .exchange import Wires
from .interface import Exchange, OuterOptimizer, Params
from .wire_formats import WIRES, Coded

Travel = Callable[[Wires], Exchange]


class Letter(NamedTuple):
    """One tree that a meeting sends: its wire format and its shapes, without [replica]."""

    wire: str
    shapes: Params


class Halves(NamedTuple):
    """Pure functions of the parameters and the outer state of one replica, without [replica]."""

    outgoing: Callable[[Params, Any], list[Params]]  # (params, outer) -> a tree of Coded for each letter
    incoming: Callable[[Params, Any, Sequence[Params]], tuple[Params, Any]]  # (params, outer, arrived)
    letters: Callable[[Params, Any], list[Letter]]  # what it sends, from shapes


def apart(build: Callable[[Travel], OuterOptimizer], name: str) -> Halves:
    """The halves of the meeting `name` of the optimizer that `build` makes with any exchange."""

    def run(travel: Travel, params: Params, outer: Any) -> tuple[Params, Any]:
        optimizer = build(travel)
        meeting = next(one for one in optimizer.meetings if one.name == name)
        held = several(outer) if optimizer.per_replica else outer
        params, held = meeting.run(several(params), held, jnp.zeros((), jnp.int32))
        return one(params), one(held) if optimizer.per_replica else held

    def written(params: Params, outer: Any) -> list[tuple[str, Params]]:
        found: list[tuple[str, Params]] = []

        def note(wire: str, tree: Params) -> Params:
            alone = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float32), tree)
            found.append((wire, alone))
            return alone

        def travel(wire: Wires) -> Exchange:
            noted = lambda tree: jax.tree.map(note, wire, tree)
            return Exchange(noted, lambda tree, row: several(noted(tree)))

        run(travel, params, outer)
        return found

    def outgoing(params: Params, outer: Any) -> list[Params]:
        return [encoded(wire, tree) for wire, tree in written(params, outer)]

    def incoming(params: Params, outer: Any, arrived: Sequence[Params]) -> tuple[Params, Any]:
        waiting = iter(arrived)

        def travel(wire: Wires) -> Exchange:
            came = lambda: jax.tree.map(lambda _: next(waiting), wire)
            return Exchange(lambda tree: came(), lambda tree, row: several(came()))

        return run(travel, params, outer)

    def letters(params: Params, outer: Any) -> list[Letter]:
        wires: list[str] = []

        def trees(params: Params, outer: Any) -> list[Params]:
            found = written(params, outer)
            wires[:] = [wire for wire, _ in found]
            return [tree for _, tree in found]

        shapes = jax.eval_shape(trees, params, outer)
        return [Letter(wire, tree) for wire, tree in zip(wires, shapes, strict=True)]

    return Halves(outgoing, incoming, letters)


def several(tree: Any) -> Any:
    """A leading [1] for every array."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def one(tree: Any) -> Any:
    """The inverse."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def encoded(wire: str, tree: Params) -> Params:
    """Every array as it travels; scalars travel as arrays of one."""
    return jax.tree.map(lambda leaf: WIRES[wire].encode(leaf if leaf.ndim else leaf[None]), tree)


def decoded(letter: Letter, codes: Params) -> Params:
    """The inverse of `encoded` on the format's grid, float32."""

    def leaf(coded: Coded, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return WIRES[letter.wire].decode(coded, (shape.shape or (1,))[-1]).reshape(shape.shape)

    return jax.tree.map(leaf, codes, letter.shapes, is_leaf=lambda part: isinstance(part, Coded))


def packed(arrays: Sequence[np.ndarray]) -> bytes:
    """The raw bytes of arrays, one after another; every processor that JAX runs on is little-endian."""
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def unpacked(payload: bytes, shapes: Sequence[Any]) -> list[np.ndarray]:
    """The inverse, for arrays of such `shapes` (anything with shape and dtype). Raises ValueError for another size."""
    wanted = sum(int(np.prod(like.shape)) * like.dtype.itemsize for like in shapes)
    if len(payload) != wanted:
        raise ValueError(f"{len(payload)} bytes, not {wanted}")
    found, start = [], 0
    for like in shapes:
        count = int(np.prod(like.shape))
        found.append(np.frombuffer(payload, like.dtype, count, start).reshape(like.shape))
        start += count * like.dtype.itemsize
    return found


def trouble(payload: bytes, letters: Sequence[tuple[str, Sequence[Any]]]) -> str | None:
    """What is wrong with coded bytes of such (wire, shapes of codes and scales): a value not finite, or a wrong size.

    None: nothing.
    """
    try:
        arrays = unpacked(payload, [shape for _, shapes in letters for shape in shapes])
    except ValueError as error:
        return str(error)
    wires = [wire for wire, shapes in letters for _ in shapes]
    bad = sum(not finite(wire, array) for wire, array in zip(wires, arrays, strict=True))
    return f"{bad} of {len(arrays)} arrays are not finite" if bad else None


def finite(wire: str, array: np.ndarray) -> bool:
    """Whether codes or scales of a format stand for finite values."""
    if array.dtype == np.float32:
        return bool(np.isfinite(array).all())
    if wire == "float32":
        return bool(np.isfinite(array.view(np.float32)).all())
    if wire == "bf16":
        return bool(((array & 0x7F80) != 0x7F80).all())
    return True  # codes of a finite scale
