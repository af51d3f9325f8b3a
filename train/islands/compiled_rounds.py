"""The programs of an island's meeting: from its state to what is sent, and from what came to its next state.

made = parcels(island, "send-2", shapes, shardings)
codes = made.send(params, outer)                         on devices, to be copied to the host as they are
tree = made.decoders[0](codes)                           float32, of whatever island's codes
params, outer = made.receive(params, outer, [mean])
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
    """The programs of one meeting."""

    send: Callable[[Any, Any], list[Any]]  # (params, outer) -> codes, a tree a letter
    receive: Callable[..., tuple[Any, Any]]  # (params, outer, arrived); consumes the first two
    messages: list[Message]
    codes: list[Any]  # shapes
    decoders: list[Callable[[Any], Any]]  # of each letter


def make_round_programs(island: Island, name: str, shapes: TrainState, shardings: TrainState) -> RoundPrograms:
    """The programs of the meeting `name`; compiled when they are first called."""
    halves = island.send_receive(name)
    where = (shardings.params, shardings.outer)
    letters = halves.messages(shapes.params, shapes.outer)
    return RoundPrograms(
        jax.jit(halves.send),
        jax.jit(halves.receive, out_shardings=where, donate_argnums=(0, 1)),
        letters,
        jax.eval_shape(halves.send, shapes.params, shapes.outer),
        [jax.jit(partial(decode, letter)) for letter in letters],
    )


def make_global_array(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """`array`, which every process has whole, at `sharding`."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@partial(jax.jit, donate_argnums=0)
def add_trees(total: Any, tree: Any) -> Any:
    """Leaf by leaf."""
    return jax.tree.map(jnp.add, total, tree)


@partial(jax.jit, donate_argnums=0)
def divide_tree(total: Any, count: jax.Array) -> Any:
    """Leaf by leaf."""
    return jax.tree.map(lambda leaf: leaf / count, total)
