"""What an outer optimizer is: its state, the meetings of the replicas, and which parameters are the run's.

Replicas train by themselves and meet now and then. A meeting is a pure function of the parameters of all replicas,
arrays [replica, ...], and the outer state; *when* it happens is two integers beside it, and *how it travels* is the
`Exchange` it was made with. So the same optimizer runs on a mesh, over sockets, and on one array in a test.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any


class Exchange(NamedTuple):
    """The only use of the slow link."""

    mean: Callable[[Params], Params]  # [replica, ...] -> [...]: the mean over all replicas, added in float32
    swap: Callable[
        [Params, jax.Array], Params
    ]  # [replica, ...], row of the pairs -> each one's partner's [replica, ...]


class OuterState(NamedTuple):
    """float32; () where an optimizer has no use for a field. Arrays have a leading [replica] if it is `per_replica`."""

    anchor: Params  # parameters after the last meeting: what drifts are measured from, and what the run is
    velocity: Params  # momentum of the outer steps, shaped like anchor
    late: Params = ()  # of the others' drifts, what has not been applied yet (eager)


class Meeting(NamedTuple):
    """Something that happens after update `offset + every`, and every `every` updates from there."""

    name: str
    every: int
    offset: int
    run: Callable[[Params, OuterState, jax.Array], tuple[Params, OuterState]]  # (params, state, row of the pairs)
    needs: str | None = None  # the meeting whose messages must have arrived before this one

    def due(self, update: int) -> bool:
        """Whether it follows update number `update`, counted from 1."""
        return update >= self.offset + self.every and (update - self.offset) % self.every == 0


class OuterOptimizer(NamedTuple):
    """Pure functions; `meetings` that follow one update run in their order."""

    init: Callable[[Params], OuterState]  # from one replica's parameters, without [replica]
    meetings: tuple[Meeting, ...]
    parameters: Callable[[Params, OuterState], Params]  # (params, state) -> what is evaluated, without [replica]
    per_replica: bool  # whether each replica has an outer state of its own


def float32(tree: Params) -> Params:
    """A float32 copy; a copy even where it is float32, because parameters are donated to every step."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), tree)


def drift(anchor: Params, params: Params) -> Params:
    """anchor - params, float32 [replica, ...]: the outer gradient of each replica."""
    return jax.tree.map(lambda old, new: old - new.astype(jnp.float32), anchor, params)


def nesterov(anchor: Params, velocity: Params, gradient: Params, *, learning_rate: float, momentum: float) -> Any:
    """velocity' = gradient + momentum velocity; anchor' = anchor - learning_rate (gradient + momentum velocity')."""
    rule = optax.trace(momentum, nesterov=True)
    direction, trace = rule.update(gradient, optax.TraceState(velocity))
    return jax.tree.map(lambda old, way: old - learning_rate * way, anchor, direction), trace.trace


def spread(anchor: Params, params: Params) -> Params:
    """`anchor` [...] or [replica, ...] as the parameters [replica, ...] of all replicas, in their dtype."""
    return jax.tree.map(lambda new, old: jnp.broadcast_to(new.astype(old.dtype), old.shape), anchor, params)


def over_replicas(tree: Params) -> Params:
    """The mean over the leading [replica], float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(axis=0), tree)
