"""The compiled programs of a synchronization round: from state to messages, and from received messages to state.

programs = make_round_programs(island, "send-2", shapes, shardings)
codes = programs.send(params, outer)                     on devices, one tree a message, to be copied to the host
tree = programs.decoders[0](codes)                       float32, from the codes of any island
params, outer = programs.receive(params, outer, [mean])
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...parallel.outer.split_round import Message, decode
from ...parallel.state import TrainState
from ..engine.island_replica import Island


class RoundPrograms(NamedTuple):
    """The programs of one outer step."""

    send: Callable[[Any, Any], list[Any]]  # (params, outer) -> codes, a tree for each message
    receive: Callable[..., tuple[Any, Any]]  # (params, outer, received) -> (params, outer); donates the first two
    messages: list[Message]
    codes: list[Any]  # shapes of what `send` returns
    decoders: list[Callable[[Any], Any]]  # codes -> float32 tree, for each message


def make_round_programs(island: Island, name: str, shapes: TrainState, shardings: TrainState) -> RoundPrograms:
    """Return the programs of the outer step `name`. They are compiled at their first call."""
    split = island.send_receive(name)
    messages = split.messages(shapes.params, shapes.outer)
    return RoundPrograms(
        jax.jit(split.send),
        jax.jit(split.receive, out_shardings=(shardings.params, shardings.outer), donate_argnums=(0, 1)),
        messages,
        jax.eval_shape(split.send, shapes.params, shapes.outer),
        [jax.jit(partial(decode, message)) for message in messages],
    )


def make_global_array(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return `array`, of which every process has all elements, on `sharding`."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@partial(jax.jit, donate_argnums=0)
def add_trees(total: Any, tree: Any) -> Any:
    """Return the sum of two trees; donates `total`."""
    return jax.tree.map(jnp.add, total, tree)


@partial(jax.jit, donate_argnums=0)
def divide_tree(total: Any, count: jax.Array) -> Any:
    """Return `total` / `count`; donates `total`."""
    return jax.tree.map(lambda leaf: leaf / count, total)
