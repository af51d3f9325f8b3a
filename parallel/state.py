"""The state of a run: one frozen pytree, replaced whole by every step."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds and a step maps to the next one."""

    step: jax.Array  # int32 scalar: updates done
    params: Any  # trained weights, nested dicts
    frozen: Any  # all other weights the forward pass reads, nested dicts
    opt_state: Any  # optax state, by name of each transform
    outer: Any  # state of the outer optimizer; () without one
    rng: jax.Array  # uint32 [2]: key data every step's randomness is folded from


def combine(params: Any, frozen: Any) -> Any:
    """One parameter tree out of the trained and the frozen part."""
    if not isinstance(params, dict) or not isinstance(frozen, dict):
        raise ValueError(
            f"{params if isinstance(frozen, dict) else frozen!r} is in both the trained and the frozen part"
        )
    shared = {key: combine(params[key], frozen[key]) for key in params.keys() & frozen.keys()}
    return params | frozen | shared
