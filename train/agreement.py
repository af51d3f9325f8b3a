"""Small questions that all processes of a run must answer alike. Collective: every process asks at the same place."""

import jax
import numpy as np


def everyones(value: int) -> list[int]:
    """The value of each process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    return [int(one) for one in multihost_utils.process_allgather(np.int32(value)).reshape(-1)]


def lowest(value: int) -> int:
    """The lowest of all processes' values."""
    return min(everyones(value))


def anyone(yes: bool) -> bool:
    """Whether any process says yes."""
    return bool(max(everyones(int(yes))))
