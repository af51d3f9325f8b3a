"""Small questions that all processes of a run must answer alike. Collective: every process asks at the same place."""

import jax
import numpy as np


def everyones(value: int) -> list[int]:
    """The value of each process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    return [int(one) for one in multihost_utils.process_allgather(np.int32(value)).reshape(-1)]


def firsts(value: int) -> int:
    """The first process's value."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def firsts_bytes(value: bytes | None) -> bytes | None:
    """The first process's bytes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    size = firsts(-1 if value is None else len(value))
    if size < 0:
        return None
    buffer = np.zeros(size, np.uint8) if value is None else np.frombuffer(value, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()


def anyone(yes: bool) -> bool:
    """Whether any process says yes."""
    return bool(max(everyones(int(yes))))
