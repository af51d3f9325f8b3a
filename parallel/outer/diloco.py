"""DiLoCo: the replicas meet every so many updates, and the mean of their drifts is the gradient of one Nesterov step.

    drift = mean over replicas of (anchor - params)
    velocity <- drift + momentum * velocity
    anchor <- anchor - learning_rate * (drift + momentum * velocity);   params <- anchor

Inner optimizer states are neither read nor sent. Source: arXiv:2311.08105, Algorithm 1.
"""

import jax

from .interface import Exchange, Meeting, OuterOptimizer, OuterState, Params, drift, float32, nesterov, spread


def diloco(exchange: Exchange, *, every: int, learning_rate: float, momentum: float) -> OuterOptimizer:
    """Meet after every `every` updates. With learning rate 1 and momentum 0 the replicas go on from their mean."""

    def init(params: Params) -> OuterState:
        return OuterState(float32(params), jax.tree.map(jax.numpy.zeros_like, float32(params)))

    def meet(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        del row
        gradient = exchange.mean(drift(state.anchor, params))
        anchor, velocity = nesterov(
            state.anchor, state.velocity, gradient, learning_rate=learning_rate, momentum=momentum
        )
        return spread(anchor, params), OuterState(anchor, velocity)

    return OuterOptimizer(init, (Meeting("meet", every, 0, meet),), lambda params, state: state.anchor, False)
