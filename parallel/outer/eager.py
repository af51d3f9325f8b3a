"""Eager DiLoCo: no replica waits for the others' outer gradients, which are applied one round late; its own at once.

    gradient = own outer gradient / R + late;   late <- mean over replicas of the outer gradients - own / R

and then DiLoCo's Nesterov step, on an anchor of each replica's own. What is sent in one outer step is needed in the
next, so the exchange may take a whole round. Source: arXiv:2502.12996, after its abstract and figures ("a mixture of
the current local outer gradient with the delayed mixture of all other replicas'"); the weights 1 / R are our reading.
"""

import jax

from . import interface
from .interface import Exchange, OuterOptimizer, OuterState, OuterStep, Params


def eager(exchange: Exchange, *, replicas: int, interval: int, learning_rate: float, momentum: float) -> OuterOptimizer:
    """An outer step every `interval` updates."""

    def init(params: Params) -> OuterState:
        state = interface.initial_state(params)
        return state._replace(late=jax.tree.map(jax.numpy.zeros_like, state.velocity))

    def run(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        del row
        local = interface.outer_gradient(state.anchor, params)
        gradient = jax.tree.map(lambda own, late: own / replicas + late, local, state.late)
        late = jax.tree.map(lambda mean, own: mean - own / replicas, exchange.mean(local), local)
        state = interface.nesterov_step(state, gradient, learning_rate=learning_rate, momentum=momentum)
        return interface.broadcast_anchor(state.anchor, params), state._replace(late=late)

    return OuterOptimizer(
        init,
        (OuterStep("meet", interval, 0, run),),
        lambda params, state: interface.mean_over_replicas(state.anchor),
        True,
    )
