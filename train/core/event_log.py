"""What happened to a run, and when: `events.jsonl`, append-only, one JSON object a line, on disk before work goes on.

    journal = Journal(directory)
    journal.record("restore", step=100, level="storage", reason="newest whole checkpoint")

    start  compile  restore        a sitting of the run begins: afresh or from a checkpoint (level, step, reason)
    save  commit                   a checkpoint begins (step, stall_seconds) and becomes whole (step, seconds)
    interval                       how many steps to the next save, and why (`checkpoint.every: auto`)
    save-failed  quarantine        one that did not (message); a damaged one is set aside (step, reason, place)
    save-skipped  save-dropped     one that back-pressure left out (step, reason)
    unprotected                    a snapshot that keepers did not protect in time (step, reason), or too few hosts
    evaluation  sample             held-out numbers; a prompt and its continuation
    skip                           an update that was not applied (loss, grad_norm)
    failure  preempted  finish     how the sitting ended; a killed one has none of these
    enter  bootstrap               an island begins with what it has, or with another one's state (source, bytes)
    excluded  behind               payloads that did not count (lost); a meeting that took place without this island
    meeting-skipped  traffic       one that did not take place; bytes sent and predicted, at the end
    restart  give-up               the launcher's word on an epoch that failed (reason, suspect, detect_seconds)
    regroup                        the launcher stopped an epoch, saved, to form up anew (reason)
    shrink  grow  move             it goes on with fewer processes, more, or others (processes, mesh, waited_seconds)

Every line has `time` (seconds since 1970) and `event`; the other fields are the event's own.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .jsonl import Lines, mend, read

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"


class Journal:
    """The journal of the run in `directory`. One process writes it; the others pass `enabled=False`.

    `allowed` is asked before every line and raises where this process may write no more.
    """

    def __init__(self, directory: Path, *, enabled: bool = True, allowed: Callable[[], None] = lambda: None) -> None:
        self.path = directory / EVENTS
        self.enabled, self._allowed, self._lines = enabled, allowed, Lines(self.path)
        if enabled:
            mend(self.path)

    def record(self, event: str, **fields: Any) -> None:
        """Append one event; when this returns, it is on the disk, where that takes it. See `Lines` for where not."""
        if self.enabled:
            self._allowed()
            self._lines.append({"time": time.time(), "event": event, **fields}, sync=True)


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Every event of the run in `directory`, oldest first; none where it has no journal yet."""
    return read(directory / EVENTS)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The metrics of each logged step once, in the order of steps; none where no step was logged yet.

    An evaluation writes a row of its own: rows of one step are one here. "NaN" and "Infinity" are numbers again.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in read(directory / METRICS):
        if "step" in row:
            values = {name: float(value) for name, value in row.items() if value is not None and name != "step"}
            steps.setdefault(int(row["step"]), {}).update(values)
    return [{"step": step, **values} for step, values in sorted(steps.items())]
