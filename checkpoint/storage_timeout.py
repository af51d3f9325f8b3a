"""Storage that hangs: a write or an fsync that never returns. What waits for it has a time-out. JAX-free.

Nothing can end a thread that is caught in such a call, and the interpreter waits for its threads before it ends: a
process that leaves such a thread behind ends by `os._exit`.
"""

import threading

from ..configs.errors import MeshwrightError

WRITER = "checkpoint"  # name of the threads that wait for storage, which end with `Storage.close` where it answers


class StorageHangs(MeshwrightError):
    """A save has not ended in time, and may never do."""


def left_behind() -> bool:
    """Whether a thread is caught in a call to storage, after everything was closed."""
    return any(thread.name.startswith(WRITER) for thread in threading.enumerate())
