"""DiLoCo: every `interval` updates, one Nesterov step along the mean of the replicas' outer gradients.

    gradient = mean over replicas of (anchor - params)
    velocity <- gradient + momentum * velocity
    anchor <- anchor - learning_rate * (gradient + momentum * velocity);   params <- anchor

Inner optimizer states are neither read nor sent. Source: arXiv:2311.08105, Algorithm 1.
"""

import jax

from . import interface
from .interface import Exchange, OuterOptimizer, OuterState, OuterStep, Params


def diloco(exchange: Exchange, *, interval: int, learning_rate: float, momentum: float) -> OuterOptimizer:
    """An outer step every `interval` updates. Learning rate 1 and momentum 0: it sets parameters to their mean."""

    def run(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        del row
        gradient = exchange.mean(interface.outer_gradient(state.anchor, params))
        state = interface.nesterov_step(state, gradient, learning_rate=learning_rate, momentum=momentum)
        return interface.broadcast_anchor(state.anchor, params), state

    return OuterOptimizer(
        interface.initial_state,
        (OuterStep("meet", interval, 0, run),),
        lambda params, state: state.anchor,
        False,
    )
