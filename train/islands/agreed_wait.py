"""Waiting for what other islands do, alike in every process of this one.

How long it may take is bounded by `islands`, not by who watches the processes: each of them tells a new sign of life
again and again. Only a request to stop ends it early.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from ...parallel.multihost import broadcast_int

REPORT_SECONDS = 1.0  # seconds between two signs of life
STOP_GRACE_SECONDS = 3.0  # seconds that what is under way still has once this island is asked to stop


class WaitStopped(Exception):
    """This island is asked to stop: what it waited for is not waited for any more."""


@dataclass
class CollectiveWait:
    """`alive` hears what is waited for; `stop` says whether the island was asked to stop, the same in every process."""

    report_waiting: Callable[[str], None]
    should_stop: Callable[[], bool]
    progress_text: Callable[[], str] = lambda: ""  # what came so far
    stop_requested_at: float | None = None  # when it was to stop

    def result(self, future: Future | None, what: str) -> Any:
        """The result of the first process's future; None in the others. Raises GivenUp, in all of them."""
        began = time.monotonic()
        while not broadcast_flag(future is None or bool(wait([future], timeout=REPORT_SECONDS).done)):
            self.report_waiting(f"waits for {what}, {time.monotonic() - began:.0f} s{self.progress_text()}")
            if self.grace_is_over():
                raise WaitStopped
        return future.result() if future else None

    def grace_is_over(self) -> bool:
        """Whether the island was asked to stop, and what is under way has had its time."""
        if not self.should_stop():
            return False
        if self.stop_requested_at is None:
            self.stop_requested_at = time.monotonic()
        return broadcast_flag(time.monotonic() - self.stop_requested_at > STOP_GRACE_SECONDS)


def broadcast_flag(yes: bool) -> bool:
    """The first process's word, in every process."""
    return bool(broadcast_int(int(yes)))
