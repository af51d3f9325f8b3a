"""When the state is saved to storage: every so many steps, or, `checkpoint.every: auto`, as often as loses the least.

Saving too often costs the stalls, too seldom the steps that a failure takes along. Daly's interval balances them, from
what this run itself measured, in all its sittings: the stall of a save, the time to come back, and how often something
failed that storage was needed for. It is worked out anew at every save, by the first process, and told to all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from .core.event_log import Journal
from .report.goodput import accounted, daly
from .report.run_record import Record, read_record

FIRST = 20  # steps before the first save of a run that has measured nothing yet
EXPECTED = 24 * 3600.0  # seconds to the first failure, until some have been seen


@dataclass
class Pace:
    """Which steps are saved. `agreed` makes the first process's number everybody's."""

    every: int | Literal["auto"]
    directory: Path
    journal: Journal
    agreed: Callable[[int], int]
    next: int | None = None  # the step of the next save, where it is worked out

    def began(self, step: int) -> None:
        """The sitting goes on from `step`; every process calls it."""
        if self.every == "auto":
            self.next = step + self._steps(step)

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        if self.every == "auto":
            return self.next is not None and step >= self.next
        return self.every > 0 and step % self.every == 0

    def saved(self, step: int) -> None:
        """A save has begun after `step`; every process calls it."""
        self.began(step)

    def _steps(self, step: int) -> int:
        """Steps to the next save, the same on every process."""
        if not self.journal.enabled:
            return self.agreed(0)
        found = interval(read_record(self.directory))
        if found is None:
            return self.agreed(FIRST)
        self.journal.record("interval", step=step, **found)
        return self.agreed(found["steps"])


def interval(record: Record) -> dict[str, Any] | None:
    """Steps between saves that lose the least, and what they were worked out from; None before anything was saved.

    A save is never begun before the one before it has been written.
    """
    goodput = accounted(record)
    if goodput.stall is None or not goodput.step:
        return None
    failure = (goodput.wall + EXPECTED) / (needed(record) + 1)
    stall = max(goodput.stall, 1e-3)
    best = daly(stall=stall, failure=failure, recovery=goodput.recovery or 0.0)
    flush = fmean([event["seconds"] for event in record.of("commit") if "seconds" in event] or [0.0])
    seconds = max(best, flush)
    return {
        "steps": max(round(seconds / goodput.step), 1),
        "interval_seconds": seconds,
        "stall_seconds": stall,
        "flush_seconds": flush,
        "failure_seconds": failure,
    }


def needed(record: Record) -> int:
    """Failures that storage was needed for: those that a snapshot in memory did not answer."""
    sittings = list(record.sittings())
    return sum(
        any(event["event"] == "restart" for event in before) and after[0].get("level") not in ("memory", "parity")
        for before, after in pairwise(sittings)
    )
