"""An outer step for replicas in programs of their own: split into sending and receiving, with the network between.

The outer optimizer is the one of the mesh. It is traced twice, with one replica and two exchanges that send nothing:
the first records what the optimizer would send, the second returns to it what was received.

    split = split_outer_step(build, "meet")
    messages = split.send(params, outer)                            codes, to be sent
    params, outer = split.receive(params, outer, received)          received: float32, one tree a message

What is sent are the raw bytes of the codes, in the order of the tree: both ends have the same configuration.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .exchange import WireNames
from .interface import Exchange, OuterOptimizer, Params
from .wire_formats import WIRE_FORMATS, EncodedArray

ExchangeFactory = Callable[[WireNames], Exchange]


class Message(NamedTuple):
    """One tree that an outer step sends: its wire format and its shapes, without [replica]."""

    wire: str
    shapes: Params


class SendReceive(NamedTuple):
    """Pure functions of the parameters and the outer state of one replica, without [replica]."""

    send: Callable[[Params, Any], list[Params]]  # (params, outer) -> a tree of EncodedArray for each message
    receive: Callable[[Params, Any, Sequence[Params]], tuple[Params, Any]]  # (params, outer, received trees)
    messages: Callable[[Params, Any], list[Message]]  # (params, outer) -> what is sent; for shapes too


def split_outer_step(build: Callable[[ExchangeFactory], OuterOptimizer], name: str) -> SendReceive:
    """Sending and receiving of the outer step `name` of the optimizer that `build` makes with any exchange."""

    def run(exchange_factory: ExchangeFactory, params: Params, outer: Any) -> tuple[Params, Any]:
        optimizer = build(exchange_factory)
        outer_step = next(step for step in optimizer.outer_steps if step.name == name)
        state = add_replica_axis(outer) if optimizer.per_replica else outer
        params, state = outer_step.run(add_replica_axis(params), state, jnp.zeros((), jnp.int32))
        return remove_replica_axis(params), remove_replica_axis(state) if optimizer.per_replica else state

    def record(params: Params, outer: Any) -> list[tuple[str, Params]]:
        sent_trees: list[tuple[str, Params]] = []

        def record_tree(wire: str, tree: Params) -> Params:
            single = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float32), tree)
            sent_trees.append((wire, single))
            return single

        def recording_exchange(wire: WireNames) -> Exchange:
            mean = lambda tree: jax.tree.map(record_tree, wire, tree)
            return Exchange(mean, lambda tree, row: add_replica_axis(mean(tree)))

        run(recording_exchange, params, outer)
        return sent_trees

    def send(params: Params, outer: Any) -> list[Params]:
        return [encode(wire, tree) for wire, tree in record(params, outer)]

    def receive(params: Params, outer: Any, received: Sequence[Params]) -> tuple[Params, Any]:
        remaining = iter(received)

        def replaying_exchange(wire: WireNames) -> Exchange:
            mean = lambda tree: jax.tree.map(lambda _: next(remaining), wire)
            return Exchange(mean, lambda tree, row: add_replica_axis(mean(tree)))

        return run(replaying_exchange, params, outer)

    def messages(params: Params, outer: Any) -> list[Message]:
        wires: list[str] = []

        def trees(params: Params, outer: Any) -> list[Params]:
            sent_trees = record(params, outer)
            wires[:] = [wire for wire, _ in sent_trees]
            return [tree for _, tree in sent_trees]

        shapes = jax.eval_shape(trees, params, outer)
        return [Message(wire, tree) for wire, tree in zip(wires, shapes, strict=True)]

    return SendReceive(send, receive, messages)


def add_replica_axis(tree: Any) -> Any:
    """Every array with a leading [1]."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def remove_replica_axis(tree: Any) -> Any:
    """The inverse of `add_replica_axis`."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def encode(wire: str, tree: Params) -> Params:
    """The codes of every array; a scalar is an array of one."""
    return jax.tree.map(lambda leaf: WIRE_FORMATS[wire].encode(leaf if leaf.ndim else leaf[None]), tree)


def decode(message: Message, codes: Params) -> Params:
    """The inverse of `encode` on the grid of the format, float32."""

    def decode_leaf(coded: EncodedArray, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return WIRE_FORMATS[message.wire].decode(coded, (shape.shape or (1,))[-1]).reshape(shape.shape)

    return jax.tree.map(decode_leaf, codes, message.shapes, is_leaf=lambda leaf: isinstance(leaf, EncodedArray))


def pack(arrays: Sequence[np.ndarray]) -> bytes:
    """The raw bytes of arrays, one after another; every processor that JAX runs on is little-endian."""
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def unpack(payload: bytes, shapes: Sequence[Any]) -> list[np.ndarray]:
    """The inverse of `pack`, for `shapes` (anything with shape and dtype). Raises ValueError for another size."""
    expected = sum(int(np.prod(like.shape)) * like.dtype.itemsize for like in shapes)
    if len(payload) != expected:
        raise ValueError(f"{len(payload)} bytes, not {expected}")
    arrays, start = [], 0
    for like in shapes:
        count = int(np.prod(like.shape))
        arrays.append(np.frombuffer(payload, like.dtype, count, start).reshape(like.shape))
        start += count * like.dtype.itemsize
    return arrays


def find_defect(payload: bytes, messages: Sequence[tuple[str, Sequence[Any]]]) -> str | None:
    """What is wrong with a payload of `messages` (wire, shapes of codes and scales): its size, or values not finite.

    None: nothing.
    """
    try:
        arrays = unpack(payload, [shape for _, shapes in messages for shape in shapes])
    except ValueError as error:
        return str(error)
    wires = [wire for wire, shapes in messages for _ in shapes]
    bad = sum(not is_finite(wire, array) for wire, array in zip(wires, arrays, strict=True))
    return f"{bad} of {len(arrays)} arrays are not finite" if bad else None


def is_finite(wire: str, array: np.ndarray) -> bool:
    """Whether codes or scales of a format stand for finite values."""
    if array.dtype == np.float32:
        return bool(np.isfinite(array).all())
    if wire == "float32":
        return bool(np.isfinite(array.view(np.float32)).all())
    if wire == "bf16":
        return bool(((array & 0x7F80) != 0x7F80).all())
    return True  # codes of a finite scale
