"""An asynchronous copy of the state, which runs beside the next training step.

A training step donates its state, so the state never stays unchanged: what is saved later must be copied first. The
copy goes from the devices to host memory that the runtime owns (`pinned_host`). The runtime orders the copy before the
next step reuses the arrays, so that step can be dispatched at once and keeps its donation.

Source: the immutability window of DataStates-LLM, arXiv:2406.10707, section 4. docs/reliability.md compares the
alternatives on a CPU.
"""

from typing import Any

import jax

PINNED = "pinned_host"


def donation_safe_copy(state: Any) -> Any:
    """Start to copy the arrays of `state` to the host, in the same shardings; return without waiting for the copy.

    Arrays that are on the host already are copied too (`may_alias=False`).
    """
    leaves, structure = jax.tree.flatten(state)
    shardings = [leaf.sharding.with_memory_kind(PINNED) for leaf in leaves]
    return jax.tree.unflatten(structure, jax.device_put(leaves, shardings, may_alias=False))
