"""The supervisor's decisions, as pure functions of what it saw. JAX-free."""

import signal
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...configs.sections.fault_tolerance import ElasticConfig

LONGEST_PAUSE = 60.0  # seconds between a failure and the restart, however many came before


@dataclass(frozen=True)
class Report:
    """The last that was heard of a process."""

    step: int  # updates done
    phase: str  # what it was about to do
    time: float  # when that was new, by the supervisor's clock
    heard: float  # when its last heartbeat came


@dataclass(frozen=True)
class Failure:
    """One epoch that ended badly."""

    time: float
    reached: int  # the highest step any process reported
    slot: int | None = None  # where the suspect was


@dataclass(frozen=True)
class Outcome:
    """How an epoch ended."""

    kind: str  # done | preempted | regroup | refused | failed
    reason: str
    reached: int = 0  # the highest step reported
    suspect: int | None = None
    detected: float = 0.0  # seconds from the last news of the suspect to this outcome
    syndrome: str = ""  # of a hang: `hang, communication` or `hang, not communication`


def gives_up(failures: Sequence[Failure], settings: ElasticConfig, *, now: float) -> bool:
    """Whether there were more failures than `restarts` within the window."""
    return sum(failure.time > now - settings.window for failure in failures) > settings.restarts


def pause(failures: Sequence[Failure], settings: ElasticConfig) -> float:
    """Seconds to wait before the next start: doubled for every failure in a row that got no further than before it."""
    fruitless = 0
    for before, after in zip(failures[-2::-1], failures[:0:-1], strict=True):
        if after.reached > before.reached:
            break
        fruitless += 1
    return min(settings.backoff * 2.0**fruitless, LONGEST_PAUSE)


def patience(durations: Sequence[float], settings: ElasticConfig) -> float:
    """Seconds without news after which a process hangs, from the seconds that steps of this epoch took so far."""
    if not durations:
        return settings.start_timeout
    return max(settings.hang_floor, settings.hang_factor * statistics.median(durations))


def suspect(reports: Mapping[int, Report], *, processes: int) -> int:
    """The process that the others wait for: one never heard of, else the lowest step, else the oldest heartbeat."""
    if silent := sorted(set(range(processes)) - reports.keys()):
        return silent[0]
    return min(reports, key=lambda number: (reports[number].step, reports[number].heard))


def culprit(codes: Mapping[int, int]) -> int:
    """The process to blame, by exit codes of those that failed: one that was killed before those that raised.

    Whoever loses a peer raises or aborts soon after it, maybe before anybody looks.
    """
    return min(codes, key=lambda number: (codes[number] >= 0, codes[number] == -signal.SIGABRT, number))


def struck(failures: Sequence[Failure], settings: ElasticConfig, *, now: float) -> frozenset[int]:
    """The slots with so many failures within the window that the run had better go on without them."""
    recent = Counter(failure.slot for failure in failures if failure.time > now - settings.window)
    del recent[None]
    return frozenset(slot for slot, count in recent.items() if settings.strikes and count >= settings.strikes)
