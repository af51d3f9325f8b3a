"""The checkpoint schedule says after which steps the state is saved to storage.

`checkpoint.every` is a number of steps, or "auto": then the interval is the one that loses the least time. Every save
costs a stall, and every failure costs the steps since the last save. Daly's formula balances the two, from what this
run has measured over all its sessions: the stall of a save, the time to recover, and how often a failure needed
storage. The first process computes the interval anew at every save and broadcasts it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from .core.event_log import EventLog
from .report.goodput import compute_goodput, daly
from .report.run_record import Record, read_record

FIRST_SAVE_STEPS = 20  # steps before the first save of a run that has measured nothing yet
EXPECTED_SECONDS_TO_FAILURE = 24 * 3600.0  # assumed until the run has seen failures


@dataclass
class CheckpointSchedule:
    """Which steps are saved. `broadcast` returns the first process's integer on every process."""

    interval: int | Literal["auto"]
    directory: Path
    event_log: EventLog
    broadcast: Callable[[int], int]
    next_step: int | None = None  # the step of the next save if `interval` is "auto"

    def restart(self, step: int) -> None:
        """Plan the next save, at the start of a session at `step` or after a save of `step`. Collective."""
        if self.interval == "auto":
            self.next_step = step + self.broadcast(self._best_steps(step) if self.event_log.enabled else 0)

    def should_save(self, step: int) -> bool:
        """Whether to save after `step`."""
        if self.interval == "auto":
            return self.next_step is not None and step >= self.next_step
        return self.interval > 0 and step % self.interval == 0

    def _best_steps(self, step: int) -> int:
        """Compute and record the steps to the next save."""
        best = best_interval(read_record(self.directory))
        if best is None:
            return FIRST_SAVE_STEPS
        self.event_log.record("interval", step=step, **best)
        return best["steps"]


def best_interval(record: Record) -> dict[str, Any] | None:
    """Return the interval that loses the least time, with what it was computed from, as fields of an "interval" event.

    None before the first save of the run. The interval is at least the time to write a save.
    """
    goodput = compute_goodput(record)
    if goodput.stall is None or not goodput.step:
        return None
    failure = (goodput.wall + EXPECTED_SECONDS_TO_FAILURE) / (count_storage_failures(record) + 1)
    stall = max(goodput.stall, 1e-3)
    best = daly(stall=stall, failure=failure, recovery=goodput.recovery or 0.0)
    flush = fmean([event["seconds"] for event in record.events_named("commit") if "seconds" in event] or [0.0])
    seconds = max(best, flush)
    return {
        "steps": max(round(seconds / goodput.step), 1),
        "interval_seconds": seconds,
        "stall_seconds": stall,
        "flush_seconds": flush,
        "failure_seconds": failure,
    }


def count_storage_failures(record: Record) -> int:
    """Count the failures from which the run did not recover by a snapshot in memory."""
    sessions = list(record.sessions())
    return sum(
        any(event["event"] == "restart" for event in before) and after[0].get("level") not in ("memory", "parity")
        for before, after in pairwise(sessions)
    )
