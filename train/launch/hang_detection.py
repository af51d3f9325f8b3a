"""Whether the processes of an epoch hang: no step for too long, by their own reports. JAX-free."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...configs.sections.fault_tolerance import ElasticConfig
from ..core.rendezvous import MembershipStore
from .restart_policies import Outcome
from .telemetry import process_reports


@dataclass(frozen=True)
class ProcessReport:
    """The newest report of a process; times are the supervisor's clock."""

    step: int  # updates done
    phase: str  # what it was about to do
    changed_at: float  # when step or phase last changed
    heartbeat_at: float  # when its last heartbeat came


@dataclass
class EpochMonitor:
    """What is known of the processes of one epoch."""

    started: float
    reports: dict[int, ProcessReport] = field(default_factory=dict)
    beats: dict[int, int] = field(default_factory=dict)  # heartbeats, by process
    step_seconds: list[float] = field(default_factory=list)  # from each process's reports

    def update(self, store: MembershipStore, epoch: int, *, now: float) -> None:
        """Read what the processes reported since the last call."""
        for index, info in process_reports(store, epoch).items():
            step, phase = int(info["step"]), str(info["phase"])
            previous, beats = self.reports.get(index), int(info["beats"])
            silent = previous is not None and beats == self.beats.get(index)
            heartbeat_at = previous.heartbeat_at if silent else now
            self.beats[index] = beats
            if previous is not None and (step, phase) == (previous.step, previous.phase):
                self.reports[index] = replace(previous, heartbeat_at=heartbeat_at)
                continue
            if previous is not None and step > previous.step and previous.phase != "start":
                self.step_seconds.append((now - previous.changed_at) / (step - previous.step))
            self.reports[index] = ProcessReport(step, phase, now, now)

    def silent_seconds(self, running: Sequence[int], *, now: float) -> float:
        """Seconds since the last news of the process that has been silent longest, among those that run."""
        return now - min((self.reports[n].changed_at if n in self.reports else self.started) for n in running)

    @property
    def stepping(self) -> bool:
        """Whether steps are being made: a process that still starts would not answer a request to stop."""
        return any(report.phase == "step" for report in self.reports.values())

    @property
    def compiling(self) -> bool:
        """Whether all processes do what needs another program than a step's, as at the start."""
        return all(report.phase in ("start", "measure") for report in self.reports.values())

    @property
    def highest_step(self) -> int:
        """The highest step any process reported."""
        return max((report.step for report in self.reports.values()), default=0)


def detect_hang(
    running: Sequence[int], monitor: EpochMonitor, settings: ElasticConfig, *, now: float
) -> Outcome | None:
    """The outcome where no step was made for too long; None where all is well. All processes of the epoch run."""
    limit, silent_seconds = hang_timeout(monitor.step_seconds, settings), monitor.silent_seconds(running, now=now)
    if monitor.compiling:
        limit = max(limit, settings.start_timeout)
    if silent_seconds <= limit:
        return None
    suspect = find_hanging_process(monitor.reports, running)
    report = monitor.reports.get(suspect)
    position = "never reported" if report is None else f"at step {report.step} ({report.phase})"
    reason = f"no step for {silent_seconds:.0f} s (limit {limit:.0f} s): process {suspect} hangs, {position}"
    return Outcome("failed", reason, monitor.highest_step, suspect, silent_seconds)


def hang_timeout(step_seconds: Sequence[float], settings: ElasticConfig) -> float:
    """Seconds without news after which a process hangs; `step_seconds` are those of this epoch's steps so far."""
    if not step_seconds:
        return settings.start_timeout
    return max(settings.hang_floor, settings.hang_factor * statistics.median(step_seconds))


def find_hanging_process(reports: Mapping[int, ProcessReport], processes: Sequence[int]) -> int:
    """The process that the others wait for.

    One of `processes` that never reported, else one at the lowest step, of those the one with the oldest heartbeat.
    """
    if silent := sorted(set(processes) - reports.keys()):
        return silent[0]
    return min(reports, key=lambda index: (reports[index].step, reports[index].heartbeat_at))
