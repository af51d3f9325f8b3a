"""NoLoCo: replicas meet in pairs, and no message ever crosses all of them.

Each replica has an anchor of its own. With the partner of this meeting, m() the mean of the two:

    velocity <- momentum * velocity + learning_rate * m(params - anchor) + consensus * (m(anchor) - anchor)
    anchor <- anchor + velocity;   params <- anchor

The momentum is heavy-ball and stays at home. Source: arXiv:2506.10911, equations 2 and 3. Equation 2 is printed with a
minus before the learning rate, against its own definition of the difference (new minus old), its expectation in
equation 32 and the released code; the plus above is theirs.

How far the anchors spread is a random walk that the last term holds together. With pairs drawn independently their
variance stays bounded if and only if 0 < consensus < `largest_consensus(momentum, replicas=R)`
(`configs/sections/outer.py`), which for many replicas is 2 (1 - momentum^2). Equation 74 has momentum < consensus <
sqrt(2 + momentum^2) instead: below its lower end the variance is bounded too; its upper end is right at the paper's
momentum, 0.5, and nowhere else.
"""

import jax
import jax.numpy as jnp

from .interface import Exchange, Meeting, OuterOptimizer, OuterState, Params, float32, over_replicas, spread


def noloco(
    exchange: Exchange, *, every: int, learning_rate: float, momentum: float, consensus: float
) -> OuterOptimizer:
    """Meet in pairs after every `every` updates. `exchange` is of (drifts, anchors), in a format each.

    Drifts may travel in a narrow format, anchors better not.
    """

    def init(params: Params) -> OuterState:
        return OuterState(float32(params), jax.tree.map(jnp.zeros_like, float32(params)))

    def meet(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        way = jax.tree.map(lambda new, old: new.astype(old.dtype) - old, params, state.anchor)
        way_there, anchor_there = exchange.swap((way, state.anchor), row)

        def velocity(old: jax.Array, way: jax.Array, way_there: jax.Array, anchor: jax.Array, there: jax.Array):
            together = momentum * old + learning_rate * (way + way_there) / 2
            return together + consensus * ((anchor + there) / 2 - anchor)

        speed = jax.tree.map(velocity, state.velocity, way, way_there, state.anchor, anchor_there)
        anchor = jax.tree.map(jnp.add, state.anchor, speed)
        return spread(anchor, params), OuterState(anchor, speed)

    return OuterOptimizer(
        init, (Meeting("meet", every, 0, meet),), lambda params, state: over_replicas(state.anchor), True
    )
