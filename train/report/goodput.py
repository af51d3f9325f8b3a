"""Goodput: the share of a run's time spent on steps that were not computed again, and the causes of the rest (badput).

It reads the event log only. Every second from the start of the first process to the end of the last is either
productive or has one cause; time between sessions in which the job did not run is not counted.

    startup   from the start of the process to the state: imports, data, joining the other processes
    restore   reading and verifying a checkpoint
    compile
    save      training waits while a checkpoint begins
    evaluate
    wasted    steps that were lost with a process and computed again
    detect    from the last heartbeat of the suspect to the launcher's decision
    wait      for a replacement of a host, before the run continued with fewer
    restart   from there to the start of the next processes

Sources: productive and preserved step time over elapsed time, as in Google's ML Productivity Goodput; the interval
between saves by Young (1974), T = sqrt(2 C M), and Daly (2006), T = sqrt(2 C (M + R)) - C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .markup import format_duration, render
from .run_record import Record

CAUSES = ("startup", "restore", "compile", "save", "evaluate", "wasted", "detect", "wait", "restart")

REGROUP_EVENTS = ("shrink", "grow", "move")  # written by the launcher after the end of a session

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Goodput:
    """The seconds of a run by cause."""

    wall: float
    productive: float
    badput: dict[str, float]  # cause -> seconds; their sum with `productive` is `wall`
    failures: int
    stall: float | None  # mean seconds that training waits for a save; None without saves
    recovery: float | None  # mean seconds from a failure to the next step; None without failures
    step: float | None  # median seconds of a step

    @property
    def share(self) -> float:
        """Productive time over wall time."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    @property
    def interval(self) -> float | None:
        """The steps between saves that lose the least time, as measured in this run; None without failures."""
        if not self.failures or not self.stall or not self.step:
            return None
        seconds = daly(stall=self.stall, failure=self.wall / self.failures, recovery=self.recovery or 0.0)
        return max(seconds / self.step, 1.0)


def daly(*, stall: float, failure: float, recovery: float) -> float:
    """The best seconds between saves, by Daly; at least `stall`.

    A save costs `stall` seconds, something fails every `failure` seconds, and a restart takes `recovery` seconds.

    >>> round(daly(stall=10.0, failure=3600.0, recovery=60.0))
    261
    """
    return max(math.sqrt(2 * stall * (failure + recovery)) - stall, stall)


def compute_goodput(record: Record) -> Goodput:
    """Attribute the time of all sessions of a run to causes."""
    sessions = list(record.sessions())
    starts = [session[0].get("step", 0) for session in sessions]
    badput = dict.fromkeys(CAUSES, 0.0)
    productive = 0.0
    for number, session in enumerate(sessions):
        # Steps after the one from which a later session continued are lost.
        causes = session_seconds(session, preserved=min(starts[number + 1 :], default=None))
        productive += causes.pop("productive")
        end = last_event(session)
        if number + 1 < len(sessions) and end["event"] in ("restart", "regroup"):
            first = sessions[number + 1][0]
            started = first["time"] - first.get("startup_seconds", 0.0) - first.get("restore_seconds", 0.0)
            causes["wait"] = sum(total(session, event, "waited_seconds") for event in REGROUP_EVENTS)
            causes["restart"] = max(started - end["time"] - causes["wait"], 0.0)
        for cause, seconds in causes.items():
            badput[cause] += seconds
    failures = len(record.events_named("restart", "give-up"))
    stalls = [event["stall_seconds"] for event in record.events_named("save") if "stall_seconds" in event]
    recovery = sum(badput[cause] for cause in ("detect", "wait", "restart", "startup", "restore", "compile"))
    return Goodput(
        wall=productive + sum(badput.values()),
        productive=productive,
        badput=badput,
        failures=failures,
        stall=fmean(stalls) if stalls else None,
        recovery=recovery / failures if failures else None,
        step=record.median("step_seconds"),
    )


def session_seconds(session: Sequence[Event], *, preserved: int | None) -> dict[str, float]:
    """Seconds of a session by cause. Steps after `preserved` were computed again; None: no step was."""
    first, end = session[0], last_event(session)
    causes = {
        "startup": first.get("startup_seconds", 0.0),
        "restore": first.get("restore_seconds", 0.0),
        "compile": total(session, "compile", "seconds"),
        "save": total(session, "save", "stall_seconds") + total(session, "save", "snapshot_seconds"),
        "evaluate": total(session, "evaluation", "seconds"),
        "detect": min(end.get("detect_seconds", 0.0), end["time"] - first["time"]),
    }
    loop = end["time"] - first["time"] - sum(causes[cause] for cause in ("compile", "save", "evaluate", "detect"))
    wasted = 0.0
    if preserved is not None and preserved <= first.get("step", 0):
        wasted = loop
    elif preserved is not None:
        saves = [event["time"] for event in session if event["event"] == "save" and event["step"] == preserved]
        if saves:
            later = [event for event in session if event["time"] > saves[-1]]
            other = total(later, "save", "stall_seconds") + total(later, "evaluation", "seconds") + causes["detect"]
            wasted = end["time"] - saves[-1] - other
    wasted = min(max(wasted, 0.0), max(loop, 0.0))
    return {**causes, "wasted": wasted, "productive": max(loop, 0.0) - wasted}


def last_event(session: Sequence[Event]) -> Event:
    """The last event of a session, without those that belong to the preparation of the next one."""
    later = ("quarantine", *REGROUP_EVENTS)
    return next(event for event in reversed(session) if event["event"] not in later or event is session[0])


def total(events: Sequence[Event], name: str, field: str) -> float:
    """The sum of `field`, in seconds, over the events called `name`."""
    return sum(float(event.get(field, 0.0)) for event in events if event["event"] == name)


def goodput_section(record: Record) -> Markup | None:
    """The report's table of causes. None if there are no events."""
    if not record.events:
        return None
    goodput = compute_goodput(record)
    wall = max(goodput.wall, 1e-9)
    seconds = {"productive": goodput.productive, **goodput.badput}
    rows = [(cause, format_duration(value), f"{100 * value / wall:.1f} %") for cause, value in seconds.items()]
    note = f"{100 * goodput.share:.1f} % of {format_duration(goodput.wall)} went into steps that were not lost."
    if goodput.interval is not None:
        note += f" Saving every {goodput.interval:.0f} steps would lose the least time (Daly)."
    return render("goodput", rows=rows, note=note)
