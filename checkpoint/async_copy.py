"""A copy of a state that no later step changes, begun at once and finished beside the next step.

A training step that donates its state has no phase in which the state is known to stay: what is saved later must be
copied first. The copy goes from the devices to memory of the host that the runtime owns (`pinned_host`): the runtime
orders it before the next step's reuse of the arrays, so the step may be sent off at once and keeps its donation.

Source: the immutability window of DataStates-LLM, arXiv:2406.10707, section 4. How the ways compare on a CPU:
docs/reliability.md.
"""

from typing import Any

import jax

PINNED = "pinned_host"


def independent(state: Any) -> Any:
    """A copy of the arrays of `state` on the host, in the same shardings. Returns before it has been made.

    Arrays that live there already are copied too: placed where they are, they would be the same arrays.
    """
    leaves, structure = jax.tree.flatten(state)
    where = [leaf.sharding.with_memory_kind(PINNED) for leaf in leaves]
    return jax.tree.unflatten(structure, jax.device_put(leaves, where, may_alias=False))
