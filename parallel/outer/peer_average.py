"""Peer averaging: pairs of replicas move toward each other; nothing else is remembered.

    params <- (1 - rate) * params + rate * the partner's params

Rate 0.5 leaves both at their mean. Source: gossip averaging as in AD-PSGD, arXiv:1710.06952, in rounds.
"""

import jax
import jax.numpy as jnp

from .interface import Exchange, Meeting, OuterOptimizer, OuterState, Params, over_replicas


def peer_average(exchange: Exchange, *, every: int, rate: float) -> OuterOptimizer:
    """Meet in pairs after every `every` updates."""

    def meet(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        mixed = jax.tree.map(lambda own, there: (1 - rate) * own + rate * there, wide, exchange.swap(wide, row))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), mixed, params), state

    return OuterOptimizer(
        lambda params: OuterState((), ()),
        (Meeting("meet", every, 0, meet),),
        lambda params, state: over_replicas(params),
        True,
    )
