"""Fencing: a process of an older epoch must not write to the run directory. JAX-free.

Every start of a run claims the next epoch, a number in the file `epoch` of the run directory. A process that was
stopped, declared dead, replaced, and then wakes up finds a higher number there than its own, and ends.
"""

import contextlib
import os
from pathlib import Path

from ...configs.errors import MeshwrightError, UserError

EPOCH_FILE = "epoch"


class FencedOutError(MeshwrightError):
    """This process belongs to an epoch that is over; a later epoch owns the run directory."""


class Fence:
    """The right of one epoch to write to a run directory. With `epoch` None nothing is refused."""

    def __init__(self, directory: Path, epoch: int | None) -> None:
        self.directory, self.epoch = directory, epoch

    def claim(self) -> None:
        """Claim the directory for this epoch, or for the next epoch if none was assigned.

        Raises FencedOutError if a later epoch owns the directory, UserError if it cannot be written.
        """
        if self.epoch is None:
            self.epoch = current_epoch(self.directory) + 1
        self.check()
        draft = self.directory / f".{EPOCH_FILE}.{os.getpid()}"
        try:
            draft.write_text(f"{self.epoch}\n")
            os.replace(draft, self.directory / EPOCH_FILE)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written: {error.strerror}; make it writable and run the same command"
            ) from error

    def check(self) -> None:
        """Raise FencedOutError if a later epoch owns the directory."""
        if self.epoch is not None and (owner := current_epoch(self.directory)) > self.epoch:
            raise FencedOutError(
                f"{self.directory} is owned by epoch {owner}; this process belongs to epoch {self.epoch} and ends"
            )


def current_epoch(directory: Path) -> int:
    """Return the epoch that owns `directory`; 0 if it was never claimed."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((directory / EPOCH_FILE).read_text())
    return 0
