"""The supervisor's decisions, as pure functions of what it saw. JAX-free."""

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...configs.sections.fault_tolerance import ElasticConfig

LONGEST_DELAY = 60.0  # seconds between a failure and the restart, however many failures came before


@dataclass(frozen=True)
class Failure:
    """One epoch that ended badly."""

    time: float
    highest_step: int  # that any process reported
    slot: int | None = None  # of the suspect


@dataclass(frozen=True)
class Outcome:
    """How an epoch ended."""

    kind: str  # done | preempted | regroup | refused | failed
    reason: str
    highest_step: int = 0  # that any process reported
    suspect: int | None = None  # the process to blame
    detection_seconds: float = 0.0  # from the last news of the suspect to this outcome
    syndrome: str = ""  # of a hang: `hang, communication` or `hang, not communication`


def too_many_failures(failures: Sequence[Failure], settings: ElasticConfig, *, now: float) -> bool:
    """Whether there were more failures than `restarts` within the window."""
    return sum(failure.time > now - settings.window for failure in failures) > settings.restarts


def restart_delay(failures: Sequence[Failure], settings: ElasticConfig) -> float:
    """Seconds to wait before the next start.

    The delay doubles with every failure in a row that got no further than the failure before it.
    """
    without_progress = 0
    for previous, failure in zip(failures[-2::-1], failures[:0:-1], strict=True):
        if failure.highest_step > previous.highest_step:
            break
        without_progress += 1
    return min(settings.backoff * 2.0**without_progress, LONGEST_DELAY)


def find_failed_process(codes: Mapping[int, int]) -> int:
    """The process to blame, by the exit codes of those that failed: one that was killed before those that raised.

    A process that loses a peer raises or aborts soon after it, maybe before the supervisor looks.
    """
    return min(codes, key=lambda index: (codes[index] >= 0, codes[index] == -signal.SIGABRT, index))


def find_unreliable_slots(failures: Sequence[Failure], settings: ElasticConfig, *, now: float) -> frozenset[int]:
    """The slots with `strikes` failures or more within the window: the run goes on without them if it can."""
    recent = Counter(failure.slot for failure in failures if failure.time > now - settings.window)
    del recent[None]
    return frozenset(slot for slot, count in recent.items() if settings.strikes and count >= settings.strikes)
