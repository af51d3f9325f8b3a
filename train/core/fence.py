"""Fencing: a process of an older epoch writes nothing more. JAX-free.

Every start of a run claims the next epoch, a number in the file `epoch` of the run directory. A process that was
stopped, declared dead and replaced, and then wakes up, finds a higher number there than its own and ends.
"""

import contextlib
import os
from pathlib import Path

from ...configs.errors import MeshwrightError, UserError

FILE = "epoch"


class Fenced(MeshwrightError):
    """This process belongs to an epoch that is over; another one has the run directory."""


class Fence:
    """The right of one epoch to write to a run directory. `epoch` None: no epoch was assigned, nothing is refused."""

    def __init__(self, directory: Path, epoch: int | None) -> None:
        self.directory, self.epoch = directory, epoch

    def claim(self) -> None:
        """Take the directory for this epoch; the next one where none was assigned.

        Raises Fenced where it is taken, UserError where it cannot be written.
        """
        if self.epoch is None:
            self.epoch = current(self.directory) + 1
        self.check()
        draft = self.directory / f".{FILE}.{os.getpid()}"
        try:
            draft.write_text(f"{self.epoch}\n")
            os.replace(draft, self.directory / FILE)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written: {error.strerror}; make it writable and run the same command"
            ) from error

    def check(self) -> None:
        """Raise Fenced where a later epoch has the directory."""
        if self.epoch is not None and (now := current(self.directory)) > self.epoch:
            raise Fenced(f"{self.directory} belongs to epoch {now} now; this process is of epoch {self.epoch} and ends")


def current(directory: Path) -> int:
    """The epoch that has the directory; 0 where none has had it."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((directory / FILE).read_text())
    return 0
