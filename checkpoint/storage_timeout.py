"""Storage that hangs: a write or an fsync may never return, so waiting for it has a timeout. JAX-free.

Nothing can end a thread that is stuck in such a call, and the interpreter waits for its threads before it exits. So a
process with a stuck thread must end by `os._exit`.
"""

import threading

from ..configs.errors import MeshwrightError

WRITER = "checkpoint"  # name of the threads that wait for storage; they end with `Storage.close` unless storage hangs


class StorageTimeout(MeshwrightError):
    """A save did not end within `checkpoint.timeout`, and may never end."""


def has_stuck_writer() -> bool:
    """Return whether a thread is stuck in a call to storage; to be asked after everything was closed."""
    return any(thread.name.startswith(WRITER) for thread in threading.enumerate())
