"""Goodput: the share of a run's time in which steps were made that nobody had to make again; and where the rest went.

Reads the journal alone. Every second from the start of the first process to the end of the last is either productive
or has one cause; the hours in which nobody ran the job are not counted.

    startup   from the start of the process to the state: imports, data, joining the others
    restore   reading and verifying a checkpoint
    compile
    save      training stood still while a checkpoint began
    evaluate
    wasted    steps that were lost with a process and made again
    detect    from the last word of the suspect to the launcher's decision
    wait      for a replacement of a host, before the run went on with fewer
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

# What the launcher writes behind the end of a sitting.
REGROUPED = ("shrink", "grow", "move")

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they were for."""

    wall: float
    productive: float
    badput: dict[str, float]  # cause -> seconds; with `productive` they make up `wall`
    failures: int
    stall: float | None  # seconds a save keeps training waiting, in the mean; None where nothing was saved
    recovery: float | None  # seconds from a failure to the next step, in the mean; None without failures
    step: float | None  # seconds a step

    @property
    def share(self) -> float:
        """Productive time over wall time."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    @property
    def interval(self) -> float | None:
        """Steps between saves that lose the least, from what this run measured; None where it cannot tell."""
        if not self.failures or not self.stall or not self.step:
            return None
        seconds = daly(stall=self.stall, failure=self.wall / self.failures, recovery=self.recovery or 0.0)
        return max(seconds / self.step, 1.0)


def young(*, stall: float, failure: float) -> float:
    """Seconds between saves of `stall` seconds where something fails every `failure` seconds.

    >>> round(young(stall=10.0, failure=3.09 * 3600))
    472
    """
    return math.sqrt(2 * stall * failure)


def daly(*, stall: float, failure: float, recovery: float) -> float:
    """The same with `recovery` seconds to come back; never below the time of a save.

    >>> round(daly(stall=10.0, failure=3600.0, recovery=60.0))
    261
    """
    return max(math.sqrt(2 * stall * (failure + recovery)) - stall, stall)


def compute_goodput(record: Record) -> Goodput:
    """Where the time of a run went, over all its sittings."""
    sittings = list(record.sessions())
    starts = [sitting[0].get("step", 0) for sitting in sittings]
    badput = dict.fromkeys(CAUSES, 0.0)
    productive = 0.0
    for number, sitting in enumerate(sittings):
        # What a later sitting went back behind was not preserved.
        spent = sitting_seconds(sitting, preserved=min(starts[number + 1 :], default=None))
        productive += spent.pop("productive")
        if number + 1 < len(sittings) and last(sitting)["event"] in ("restart", "regroup"):
            spent["wait"] = sum(total(sitting, event, "waited_seconds") for event in REGROUPED)
            spent["restart"] = max(born(sittings[number + 1]) - last(sitting)["time"] - spent["wait"], 0.0)
        for cause, seconds in spent.items():
            badput[cause] += seconds
    failures = len(record.events_named("restart", "give-up"))
    stalls = [event["stall_seconds"] for event in record.events_named("save") if "stall_seconds" in event]
    recovered = sum(badput[cause] for cause in ("detect", "wait", "restart", "startup", "restore", "compile"))
    return Goodput(
        wall=productive + sum(badput.values()),
        productive=productive,
        badput=badput,
        failures=failures,
        stall=fmean(stalls) if stalls else None,
        recovery=recovered / failures if failures else None,
        step=record.median("step_seconds"),
    )


def sitting_seconds(sitting: Sequence[Event], *, preserved: int | None) -> dict[str, float]:
    """Seconds of one sitting by what they were for. `preserved`: the step that was gone on from; None: all is kept."""
    first, end = sitting[0], last(sitting)
    spent = {
        "startup": first.get("startup_seconds", 0.0),
        "restore": first.get("restore_seconds", 0.0),
        "compile": total(sitting, "compile", "seconds"),
        "save": total(sitting, "save", "stall_seconds") + total(sitting, "save", "snapshot_seconds"),
        "evaluate": total(sitting, "evaluation", "seconds"),
        "detect": min(end.get("detect_seconds", 0.0), end["time"] - first["time"]),
    }
    loop = end["time"] - first["time"] - sum(spent[cause] for cause in ("compile", "save", "evaluate", "detect"))
    wasted = 0.0
    if preserved is not None and preserved <= first.get("step", 0):
        wasted = loop
    elif preserved is not None:
        saves = [event["time"] for event in sitting if event["event"] == "save" and event["step"] == preserved]
        if saves:
            after = [event for event in sitting if event["time"] > saves[-1]]
            known = total(after, "save", "stall_seconds") + total(after, "evaluation", "seconds") + spent["detect"]
            wasted = end["time"] - saves[-1] - known
    wasted = min(max(wasted, 0.0), max(loop, 0.0))
    return {**spent, "wasted": wasted, "productive": max(loop, 0.0) - wasted}


def last(sitting: Sequence[Event]) -> Event:
    """The event a sitting ended with; what the next one sets aside before it begins is not its."""
    later = ("quarantine", *REGROUPED)
    return next(event for event in reversed(sitting) if event["event"] not in later or event is sitting[0])


def born(sitting: Sequence[Event]) -> float:
    """When the process of a sitting was started."""
    first = sitting[0]
    return first["time"] - first.get("startup_seconds", 0.0) - first.get("restore_seconds", 0.0)


def total(events: Sequence[Event], name: str, field: str) -> float:
    """Seconds of all events of a name."""
    return sum(float(event.get(field, 0.0)) for event in events if event["event"] == name)


def goodput_section(record: Record) -> Markup | None:
    """The account as a table. None where nothing ran."""
    if not record.events:
        return None
    found = compute_goodput(record)
    rows = [("productive", found.productive), *found.badput.items()]
    lines = [
        (name, format_duration(seconds), f"{100 * seconds / max(found.wall, 1e-9):.1f} %") for name, seconds in rows
    ]
    note = f"{100 * found.share:.1f} % of {format_duration(found.wall)} made steps that stayed."
    if found.interval is not None:
        note += f" Saving every {found.interval:.0f} steps would lose the least (Daly)."
    return render("goodput", rows=lines, note=note)
