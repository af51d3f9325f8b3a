"""The event log of a run: `events.jsonl`, append-only, one JSON object a line, on the disk before work goes on.

    event_log = EventLog(directory)
    event_log.record("restore", step=100, level="storage", reason="newest whole checkpoint")

    start  compile  restore        a session begins, from nothing or from a checkpoint (level, step, reason)
    save  commit                   a checkpoint is begun (step, stall_seconds) and is complete (step, seconds)
    interval                       the number of steps to the next save, and why (`checkpoint.every: auto`)
    save-failed  quarantine        a save failed (message); a damaged checkpoint was set aside (step, reason, place)
    save-skipped  save-dropped     back-pressure left a save out (step, reason)
    unprotected                    parity did not protect a snapshot in time (step, reason), or there are too few hosts
    evaluation  sample             held-out metrics; a prompt and its continuation
    skip                           an update was not applied (loss, grad_norm)
    failure  preempted  finish     how the session ended; a killed session writes none of these
    enter  bootstrap               an island starts with its own state, or with another island's (source, bytes)
    excluded  behind               payloads did not count (lost); a synchronization round ran without this island
    meeting-skipped  traffic       a synchronization round did not happen; bytes sent and predicted, at the end
    restart  give-up               the launcher's verdict on an epoch that failed (reason, suspect, detect_seconds)
    regroup                        the launcher saved and stopped an epoch to change its processes (reason)
    shrink  grow  move             the run goes on with fewer, more or other processes (processes, mesh, waited_seconds)

Every line has `time` (seconds since 1970) and `event`; the other fields depend on the event.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .jsonl import LineWriter, read_rows, repair_last_line

EVENTS_FILE = "events.jsonl"
METRICS = "metrics.jsonl"


class EventLog:
    """Writes the event log of the run in `directory`. One process writes; the others pass `enabled=False`.

    `check_allowed` is called before every line. It raises if this process may no longer write (see `fence`).
    """

    def __init__(
        self, directory: Path, *, enabled: bool = True, check_allowed: Callable[[], None] = lambda: None
    ) -> None:
        self.path = directory / EVENTS_FILE
        self.enabled, self._check_allowed, self._lines = enabled, check_allowed, LineWriter(self.path)
        if enabled:
            repair_last_line(self.path)

    def record(self, event: str, **fields: Any) -> None:
        """Append one event and wait until it is on the disk. `LineWriter` says what a failing disk does."""
        if self.enabled:
            self._check_allowed()
            self._lines.append({"time": time.time(), "event": event, **fields}, sync=True)


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Return every event of the run in `directory`, oldest first; empty if it has no event log yet."""
    return read_rows(directory / EVENTS_FILE)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """Return one row of metrics per logged step, in the order of steps; empty if no step was logged yet.

    An evaluation writes a row of its own, so rows of the same step are merged. "NaN" and "Infinity" become floats.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in read_rows(directory / METRICS):
        if "step" in row:
            values = {name: float(value) for name, value in row.items() if value is not None and name != "step"}
            steps.setdefault(int(row["step"]), {}).update(values)
    return [{"step": step, **values} for step, values in sorted(steps.items())]
