"""Local SGD: every so many updates all replicas go on from their mean; there is no outer momentum.

    anchor <- anchor - mean over replicas of (anchor - params);   params <- anchor

Drifts travel, not parameters: they are small, so a narrow format costs little. Source: arXiv:1805.09767.
"""

import jax

from .interface import Exchange, Meeting, OuterOptimizer, OuterState, Params, drift, float32, spread


def local_sgd(exchange: Exchange, *, every: int) -> OuterOptimizer:
    """Meet after every `every` updates, at the mean."""

    def meet(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        del row
        mean = exchange.mean(drift(state.anchor, params))
        anchor = jax.tree.map(lambda old, way: old - way, state.anchor, mean)
        return spread(anchor, params), OuterState(anchor, ())

    return OuterOptimizer(
        lambda params: OuterState(float32(params), ()),
        (Meeting("meet", every, 0, meet),),
        lambda params, state: state.anchor,
        False,
    )
