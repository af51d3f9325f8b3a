"""Waiting for what other islands do, alike in every process of this one.

How long it may take is bounded by `islands`, not by who watches the processes: each of them tells a new sign of life
again and again. Only a request to stop ends it early.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from ...parallel.multihost import firsts

NEWS = 1.0  # seconds between two signs of life
HURRY = 3.0  # seconds that what is under way still has once this island is asked to stop


class GivenUp(Exception):
    """This island is asked to stop: what it waited for is not waited for any more."""


@dataclass
class Waiting:
    """`alive` hears what is waited for; `stop` says whether the island was asked to stop, the same in every process."""

    alive: Callable[[str], None]
    stop: Callable[[], bool]
    told: Callable[[], str] = lambda: ""  # what came so far
    asked: float | None = None  # when it was to stop

    def result(self, future: Future | None, what: str) -> Any:
        """The result of the first process's future; None in the others. Raises GivenUp, in all of them."""
        began = time.monotonic()
        while not agreed(future is None or bool(wait([future], timeout=NEWS).done)):
            self.alive(f"waits for {what}, {time.monotonic() - began:.0f} s{self.told()}")
            if self.hurried():
                raise GivenUp
        return future.result() if future else None

    def hurried(self) -> bool:
        """Whether the island was asked to stop, and what is under way has had its time."""
        if not self.stop():
            return False
        if self.asked is None:
            self.asked = time.monotonic()
        return agreed(time.monotonic() - self.asked > HURRY)


def agreed(yes: bool) -> bool:
    """The first process's word, in every process."""
    return bool(firsts(int(yes)))
