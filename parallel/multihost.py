"""Communication of small values between the processes of a run. Every process calls the same functions in one order."""

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

BARRIER_NUMBERS = itertools.count()
CHUNK_BYTES = 1 << 30  # broadcast at once: sizes and indices on devices have 32 bits


def barrier(*, seconds: float) -> None:
    """Wait until every process is here, for `seconds` at most.

    Not by a collective: on a CPU the first one between some devices waits half a minute for the slowest, then fails.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"meshwright {next(BARRIER_NUMBERS)}", timeout_ms=int(1000 * seconds))


def all_gather_int(value: int) -> list[int]:
    """The integer of each process."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()


def broadcast_int(value: int) -> int:
    """The integer of process 0."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def broadcast_bytes(value: bytes | None) -> bytes | None:
    """The bytes of process 0, or None; broadcast in chunks of `CHUNK_BYTES`."""
    if jax.process_count() == 1:
        return value
    full_chunks, remainder = (-1, 0) if value is None else divmod(len(value), CHUNK_BYTES)
    full_chunks, remainder = broadcast_int(full_chunks), broadcast_int(remainder)
    if full_chunks < 0:
        return None
    chunks = []
    for number, size in enumerate([CHUNK_BYTES] * full_chunks + [remainder]):
        start = number * CHUNK_BYTES
        buffer = np.zeros(size, np.uint8) if value is None else np.frombuffer(value[start : start + size], np.uint8)
        chunks.append(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
    return b"".join(chunks)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return bool(max(all_gather_int(int(flag))))
