"""Waiting for other islands, with the same result in every process of this island.

The waiting time is bounded by the section `islands`, not by the supervisor of the processes: each process reports again
and again that it waits. Only a request to stop ends a wait early.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from ...parallel.multihost import broadcast_int

REPORT_SECONDS = 1.0  # between two reports of a wait
STOP_GRACE_SECONDS = 3.0  # a wait may still last this long after a request to stop


class WaitStopped(Exception):
    """The wait was given up because this island was asked to stop."""


@dataclass
class CollectiveWait:
    """Waits that all processes of this island enter and leave together.

    `should_stop` returns whether the island was asked to stop, the same in every process.
    """

    report_waiting: Callable[[str], None]
    should_stop: Callable[[], bool]
    progress_text: Callable[[], str] = lambda: ""  # what has arrived so far, for the reports
    stop_requested_at: float | None = None

    def result(self, future: Future | None, description: str) -> Any:
        """Wait for the future of process 0; return its result there and None in other processes, which pass None.

        Raises WaitStopped in all processes if the island was asked to stop.
        """
        start = time.monotonic()
        while not broadcast_flag(future is None or bool(wait([future], timeout=REPORT_SECONDS).done)):
            self.report_waiting(f"waits for {description}, {time.monotonic() - start:.0f} s{self.progress_text()}")
            if self.grace_is_over():
                raise WaitStopped
        return future.result() if future else None

    def grace_is_over(self) -> bool:
        """Return whether the island was asked to stop more than `STOP_GRACE_SECONDS` ago."""
        if not self.should_stop():
            return False
        if self.stop_requested_at is None:
            self.stop_requested_at = time.monotonic()
        return broadcast_flag(time.monotonic() - self.stop_requested_at > STOP_GRACE_SECONDS)


def broadcast_flag(flag: bool) -> bool:
    """Return the flag of process 0 in every process. A collective call."""
    return bool(broadcast_int(int(flag)))
