"""NoLoCo: replicas synchronize in pairs, without any all-reduce.

Each replica has an anchor of its own. With m() the mean over the replica and its partner in this round:

    velocity <- momentum * velocity + learning_rate * m(params - anchor) + consensus * (m(anchor) - anchor)
    anchor <- anchor + velocity;   params <- anchor

The momentum is heavy-ball and is not sent. Source: arXiv:2506.10911, equations 2 and 3. Equation 2 is printed with a
minus before the learning rate, which contradicts its own definition of the difference (new minus old), its expectation
in equation 32 and the released code; these have the plus above.

The distances between anchors are a random walk that the last term bounds. With pairs drawn independently their
variance stays bounded if and only if 0 < consensus < `largest_consensus(momentum, replicas=R)`
(`configs/sections/outer.py`), which for many replicas is 2 (1 - momentum^2). Equation 74 has momentum < consensus <
sqrt(2 + momentum^2) instead: below its lower bound the variance is bounded too; its upper bound is right at the paper's
momentum, 0.5, and nowhere else.
"""

import jax
import jax.numpy as jnp

from . import interface
from .interface import Exchange, OuterOptimizer, OuterState, OuterStep, Params


def noloco(
    exchange: Exchange, *, interval: int, learning_rate: float, momentum: float, consensus: float
) -> OuterOptimizer:
    """An outer step in pairs every `interval` updates. `exchange` swaps (changes, anchors), in a wire format each.

    Changes (params - anchor) may travel in a narrow format; anchors should not.
    """

    def run(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        changes = jax.tree.map(lambda new, old: new.astype(old.dtype) - old, params, state.anchor)
        partner = exchange.swap((changes, state.anchor), row)

        def new_velocity(velocity, change, anchor, partner_change, partner_anchor) -> jax.Array:
            step = momentum * velocity + learning_rate * (change + partner_change) / 2
            return step + consensus * ((anchor + partner_anchor) / 2 - anchor)

        velocity = jax.tree.map(new_velocity, state.velocity, changes, state.anchor, *partner)
        anchor = jax.tree.map(jnp.add, state.anchor, velocity)
        return interface.broadcast_anchor(anchor, params), OuterState(anchor, velocity)

    return OuterOptimizer(
        interface.initial_state,
        (OuterStep("meet", interval, 0, run),),
        lambda params, state: interface.mean_over_replicas(state.anchor),
        True,
    )
