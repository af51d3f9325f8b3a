"""Eager DiLoCo: nobody waits for the others' drifts; they are applied a round late, one's own at once.

    gradient = own drift / R + late;   late <- mean over replicas of their drifts - own drift / R

and then DiLoCo's Nesterov step, on an anchor of each replica's own. What is sent at one meeting is needed at the next,
so the exchange has a whole round to arrive. Source: arXiv:2502.12996, after its abstract and figures ("a mixture of the
current local outer gradient with the delayed mixture of all other replicas'"); the weights 1 / R are ours to read so.
"""

import jax
import jax.numpy as jnp

from .interface import (
    Exchange,
    Meeting,
    OuterOptimizer,
    OuterState,
    Params,
    drift,
    float32,
    nesterov,
    over_replicas,
    spread,
)


def eager(exchange: Exchange, *, replicas: int, every: int, learning_rate: float, momentum: float) -> OuterOptimizer:
    """Meet after every `every` updates."""

    def init(params: Params) -> OuterState:
        return OuterState(float32(params), *(jax.tree.map(jnp.zeros_like, float32(params)) for _ in range(2)))

    def meet(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        del row
        own = drift(state.anchor, params)
        gradient = jax.tree.map(lambda mine, late: mine / replicas + late, own, state.late)
        late = jax.tree.map(lambda mean, mine: mean - mine / replicas, exchange.mean(own), own)
        anchor, velocity = nesterov(
            state.anchor, state.velocity, gradient, learning_rate=learning_rate, momentum=momentum
        )
        return spread(anchor, params), OuterState(anchor, velocity, late)

    return OuterOptimizer(
        init, (Meeting("meet", every, 0, meet),), lambda params, state: over_replicas(state.anchor), True
    )
