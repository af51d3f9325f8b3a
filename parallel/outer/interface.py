"""The interface of outer optimizers: state, outer steps of the replicas, and the parameters that are evaluated.

Replicas train by themselves and synchronize now and then. An outer step is a pure function of the parameters of all
replicas, arrays [replica, ...], and the outer state. *When* it happens is two integers beside it, and *how values
travel* is the `Exchange` it was built with, so the same optimizer runs on a mesh, over sockets, and on one array in a
test.
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
    swap: Callable[[Params, jax.Array], Params]  # [replica, ...], row of the matchings -> each one's partner's values


class OuterState(NamedTuple):
    """float32; () for a field that is not used. Arrays have a leading [replica] if the optimizer is `per_replica`."""

    anchor: Params  # parameters after the last outer step: outer gradients start there, and they are evaluated
    velocity: Params  # momentum of the outer steps, shaped like anchor
    late: Params = ()  # the other replicas' outer gradients that have not been applied yet (eager)


class OuterStep(NamedTuple):
    """A function that runs after update `offset + interval`, and after every `interval` updates from there."""

    name: str
    interval: int
    offset: int
    run: Callable[[Params, OuterState, jax.Array], tuple[Params, OuterState]]  # (params, state, row of the matchings)
    depends_on: str | None = None  # the outer step whose messages must have arrived before this one

    def is_due(self, update: int) -> bool:
        """Whether it runs after update number `update`, counted from 1."""
        return update >= self.offset + self.interval and (update - self.offset) % self.interval == 0


class OuterOptimizer(NamedTuple):
    """Pure functions; `outer_steps` that are due after the same update run in their order."""

    init: Callable[[Params], OuterState]  # from one replica's parameters, without [replica]
    outer_steps: tuple[OuterStep, ...]
    eval_params: Callable[[Params, OuterState], Params]  # (params, state) -> what is evaluated, without [replica]
    per_replica: bool  # whether each replica has an outer state of its own


def initial_state(params: Params) -> OuterState:
    """Anchor `params` and zero velocity, float32; the anchor is always a copy, as parameters are donated every step."""
    anchor = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return OuterState(anchor, jax.tree.map(jnp.zeros_like, anchor))


def outer_gradient(anchor: Params, params: Params) -> Params:
    """The outer gradient of each replica: anchor - params, float32 [replica, ...]."""
    return jax.tree.map(lambda old, new: old - new.astype(jnp.float32), anchor, params)


def nesterov_step(state: OuterState, gradient: Params, *, learning_rate: float, momentum: float) -> OuterState:
    """velocity' = gradient + momentum velocity; anchor' = anchor - learning_rate (gradient + momentum velocity')."""
    rule = optax.trace(momentum, nesterov=True)
    direction, trace = rule.update(gradient, optax.TraceState(state.velocity))
    anchor = jax.tree.map(lambda old, step: old - learning_rate * step, state.anchor, direction)
    return state._replace(anchor=anchor, velocity=trace.trace)


def broadcast_anchor(anchor: Params, params: Params) -> Params:
    """`anchor` [...] or [replica, ...] as the parameters [replica, ...] of all replicas, in the dtype of `params`."""
    return jax.tree.map(lambda new, old: jnp.broadcast_to(new.astype(old.dtype), old.shape), anchor, params)


def mean_over_replicas(tree: Params) -> Params:
    """The mean over the leading [replica], float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(axis=0), tree)
