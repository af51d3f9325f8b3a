"""Small questions that all processes of a run must answer alike. Collective: every process asks at the same place."""

import itertools

import jax
import numpy as np

MEETING = itertools.count()
PART = 1 << 30  # bytes told at once: sizes and indices on devices have 32 bits


def barrier(*, seconds: float) -> None:
    """Wait until every process is here, for `seconds` at most.

    Not a collective: on a CPU the first one between some devices waits half a minute for the slowest, and then fails.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"meshwright {next(MEETING)}", timeout_ms=int(1000 * seconds))


def all_gather_int(value: int) -> list[int]:
    """The value of each process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    return [int(one) for one in multihost_utils.process_allgather(np.int32(value)).reshape(-1)]


def broadcast_int(value: int) -> int:
    """The first process's value."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def broadcast_bytes(value: bytes | None) -> bytes | None:
    """The first process's bytes, in parts of `PART` where they are many."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    whole, rest = (-1, 0) if value is None else divmod(len(value), PART)
    whole, rest = broadcast_int(whole), broadcast_int(rest)
    if whole < 0:
        return None
    parts = []
    for number, size in enumerate([PART] * whole + [rest]):
        part = None if value is None else value[number * PART : number * PART + size]
        buffer = np.zeros(size, np.uint8) if part is None else np.frombuffer(part, np.uint8)
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
    return b"".join(parts)


def any_process(yes: bool) -> bool:
    """Whether any process says yes."""
    return bool(max(all_gather_int(int(yes))))
