"""Local SGD: every `interval` updates all replicas continue from their mean; there is no outer momentum.

    anchor <- anchor - mean over replicas of (anchor - params);   params <- anchor

Outer gradients travel, not parameters: they are small, so a narrow format costs little. Source: arXiv:1805.09767.
"""

import jax

from . import interface
from .interface import Exchange, OuterOptimizer, OuterState, OuterStep, Params


def local_sgd(exchange: Exchange, *, interval: int) -> OuterOptimizer:
    """Set the parameters to their mean every `interval` updates."""

    def run(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        del row
        mean = exchange.mean(interface.outer_gradient(state.anchor, params))
        anchor = jax.tree.map(lambda old, gradient: old - gradient, state.anchor, mean)
        return interface.broadcast_anchor(anchor, params), OuterState(anchor, ())

    return OuterOptimizer(
        lambda params: interface.initial_state(params)._replace(velocity=()),
        (OuterStep("meet", interval, 0, run),),
        lambda params, state: state.anchor,
        False,
    )
