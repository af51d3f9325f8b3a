"""Peer averaging: pairs of replicas move toward each other; there is no outer state.

    params <- (1 - rate) * params + rate * the partner's params

Rate 0.5 sets both to their mean. Source: gossip averaging as in AD-PSGD, arXiv:1710.06952, in rounds.
"""

import jax
import jax.numpy as jnp

from .interface import Exchange, OuterOptimizer, OuterState, OuterStep, Params, mean_over_replicas


def peer_average(exchange: Exchange, *, interval: int, rate: float) -> OuterOptimizer:
    """Average in pairs every `interval` updates."""

    def run(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        mixed = jax.tree.map(lambda own, partner: (1 - rate) * own + rate * partner, wide, exchange.swap(wide, row))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), mixed, params), state

    return OuterOptimizer(
        lambda params: OuterState((), ()),
        (OuterStep("meet", interval, 0, run),),
        lambda params, state: mean_over_replicas(params),
        True,
    )
