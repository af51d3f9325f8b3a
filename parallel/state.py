"""The state of a run: one frozen pytree, replaced whole by every step."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes and a checkpoint holds."""

    step: jax.Array  # int32 scalar: number of updates done
    params: Any  # trained weights, nested dicts
    frozen: Any  # all other weights that the forward pass reads, nested dicts
    opt_state: Any  # optax state, by name of each transform
    outer: Any  # state of the outer optimizer; () without one
    rng: jax.Array  # uint32 [2]: data of the key that each step's keys are folded from


def combine(params: Any, frozen: Any) -> Any:
    """One parameter tree from the trained and the frozen part. Raises ValueError if a weight is in both."""
    if not isinstance(params, dict) or not isinstance(frozen, dict):
        raise ValueError(
            f"{params if isinstance(frozen, dict) else frozen!r} is in both the trained and the frozen part"
        )
    shared = {key: combine(params[key], frozen[key]) for key in params.keys() & frozen.keys()}
    return params | frozen | shared
