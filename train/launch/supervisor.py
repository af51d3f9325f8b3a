"""The supervisor: starts the processes of a run, watches their steps, and starts all again when one dies or hangs.

It stands outside the processes, so that any of them may die, the first included, and it trusts steps, not liveness: a
process waiting for a dead peer is alive for ever. Each start is an epoch: its own coordination service, its own names,
and a fence against processes of earlier ones. JAX-free.

    done        every process ended with 0
    preempted   asked to stop, and saved in time: exit code 75, start me again
    refused     a process found the configuration wrong: exit code 2, no restart would help
    failed      a process died, or hung: kill all, wait, start all; give up after too many
    regroup     stopped by the supervisor itself: slots were drained, or a larger mesh fits again
"""

import logging
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ...configs.errors import MeshwrightError, Preemption, UserError
from ...configs.sections.fault_tolerance import ElasticConfig
from ..core.event_log import EventLog
from ..core.fence import Fence, current_epoch
from ..core.heartbeat import CORRUPT_PHASE
from ..core.rendezvous import MembershipStore
from . import restart_policies as policies
from .drain import read_drained
from .hang_detection import EpochMonitor, detect_hang
from .mesh_options import Assignment, MeshOption
from .regroup import Regrouping, change_event
from .restart_policies import Failure, Outcome
from .telemetry import Telemetry

POLL_SECONDS = 0.1  # between two looks
TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes of a process that SIGTERM ended

logger = logging.getLogger(__name__)


class LaunchEngine(Protocol):
    """Where processes run: starts, signals and polls them. All of one epoch are started before any is polled."""

    processes: int  # of the epoch; before the first one, as many as were asked for

    def available_slots(self) -> Collection[int]:
        """The slots in which a process could be started now; a lost one is missing, a replacement has its number."""

    def acquire(self, slots: Collection[int]) -> None:
        """Have a place for a process in each of `slots`. Raises MeshwrightError where machines do not come in time."""

    def start(self, epoch: int, *, slots: Sequence[int], overrides: Sequence[str]) -> None:
        """Start what coordinates the processes of `epoch`, and one in each slot, with `overrides` after the command."""

    def poll(self, index: int) -> int | None:
        """Exit code of process `index` of the epoch; None while it runs."""

    def service_failure(self) -> str | None:
        """How the service that coordinates the processes failed; None where all is well."""

    def request_stop(self) -> None:
        """Send SIGTERM to all that run."""

    def kill(self) -> None:
        """Send SIGKILL to all that are left, with everything they started; returns once they have ended."""


class StopRequest(Protocol):
    """Whether somebody asked the supervisor itself to stop."""

    requested: bool


@dataclass
class Supervisor:
    """Runs the processes of a run on `engine` until they end well. `directory` is the run's, `store` where they report.

    `mesh_options` are what the run may compute on, the preferred first (default: as many processes as the engine has).
    `telemetry` says what is slow, or why something hangs.
    """

    engine: LaunchEngine
    settings: ElasticConfig
    directory: Path
    store: MembershipStore
    stop: StopRequest
    mesh_options: Sequence[MeshOption] = ()
    telemetry: Telemetry = field(default_factory=Telemetry)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._failures: list[Failure] = []
        self._regrouping = Regrouping(
            tuple(self.mesh_options) or (MeshOption(self.engine.processes),),
            self.settings,
            available_slots=self.engine.available_slots,
            drained_slots=lambda: read_drained(self.directory),
            unreliable_slots=lambda: policies.find_unreliable_slots(self._failures, self.settings, now=self.clock()),
        )

    def run(self) -> None:
        """Run until every process ended well.

        Raises Preemption where all stopped on request, UserError where a process refused the configuration,
        MeshwrightError where the supervisor gave up.
        """
        epoch, reason = current_epoch(self.directory), "started"
        while True:
            assignment = self._assign_slots(reason)
            epoch = max(epoch, current_epoch(self.directory)) + 1
            if self.directory.exists():
                Fence(self.directory, epoch).claim()  # before the new ones start: old ones may still be writing
            try:
                self.engine.start(epoch, slots=assignment.slots, overrides=assignment.option.overrides)
                outcome = self._monitor_epoch(epoch)
            finally:
                self.engine.kill()
            reason = outcome.reason
            if outcome.kind == "done":
                return
            if outcome.kind in ("preempted", "regroup") and self.stop.requested:
                raise Preemption("stopped on request, state saved; run the same command to go on")
            if outcome.kind == "refused":
                raise UserError(outcome.reason)
            if outcome.kind == "regroup":
                self._record_outcome("regroup", outcome, epoch=epoch)
                continue
            if outcome.kind == "failed":
                slot = None if outcome.suspect is None else assignment.slots[outcome.suspect]
                self._failures.append(Failure(self.clock(), outcome.highest_step, slot))
            if self.stop.requested or policies.too_many_failures(self._failures, self.settings, now=self.clock()):
                self._record_outcome("give-up", outcome, epoch=epoch, failures=len(self._failures))
                if not self.stop.requested and len(self._failures) > 1:
                    reason = f"{reason}; gave up after {len(self._failures)} failures (elastic.restarts)"
                raise MeshwrightError(reason)
            failed = outcome.kind == "failed"
            seconds = policies.restart_delay(self._failures, self.settings) if failed else self.settings.backoff
            self._record_outcome("restart", outcome, epoch=epoch, pause_seconds=seconds)
            self.sleep(seconds)

    def _assign_slots(self, reason: str) -> Assignment:
        """Choose the slots and the mesh of the next epoch; log a change. `reason` says how the last epoch ended.

        Raises MeshwrightError where what is left fits no mesh, Preemption where a stop is requested meanwhile.
        """
        regrouping, began, before = self._regrouping, self.clock(), self._regrouping.current
        assignment = regrouping.wait_for_assignment(
            stopped=lambda: self.stop.requested, clock=self.clock, sleep=self.sleep
        )
        if self.stop.requested and before is not None:
            raise Preemption("stopped on request between two epochs; run the same command to go on")
        if assignment is None:
            raise MeshwrightError(
                f"slots {sorted(regrouping.available_slots())} are left, {sorted(regrouping.drained_slots())} are "
                f"drained, and no mesh fits what there is ({reason}); add one to elastic.meshes, or bring hosts back "
                "and run the same command"
            )
        regrouping.current = assignment
        before = before or Assignment(regrouping.options[0], assignment.slots)
        event = change_event(before, assignment, options=regrouping.options)
        if event is not None:
            size, mesh, slots = len(assignment.slots), assignment.option.mesh, list(assignment.slots)
            waited = self.clock() - began
            record_event(
                self.directory, event, reason=reason, processes=size, mesh=mesh, slots=slots, waited_seconds=waited
            )
        return assignment

    def _record_outcome(self, event: str, outcome: Outcome, **fields: object) -> None:
        """Log how an epoch ended."""
        record_event(
            self.directory,
            event,
            reason=outcome.reason,
            suspect=outcome.suspect,
            step=outcome.highest_step,
            detect_seconds=outcome.detection_seconds,
            **({"syndrome": outcome.syndrome} if outcome.syndrome else {}),
            **fields,
        )

    def _monitor_epoch(self, epoch: int) -> Outcome:
        """Watch the processes of one epoch until it is over; some may still be running then."""
        engine, grace, monitor = self.engine, self.settings.grace, EpochMonitor(self.clock())
        deadline: float | None = None  # by which all must have ended, once one has or was asked to
        stopping = False
        regroup_reason: str | None = None
        while True:
            now = self.clock()
            monitor.update(self.store, epoch, now=now)
            self.telemetry.update(self.store, epoch, slots=self._regrouping.current.slots, now=now)
            codes = {index: engine.poll(index) for index in range(engine.processes)}
            if (outcome := judge_exit_codes(codes, monitor, now=now, stopping=stopping)) is not None:
                if regroup_reason and outcome.kind == "preempted":
                    return replace(outcome, kind="regroup", reason=regroup_reason)
                return outcome
            if (failure := engine.service_failure()) is not None:
                return Outcome("failed", failure, monitor.highest_step)
            if deadline is None and monitor.stepping:
                regroup_reason = self._regrouping.stop_reason(now=now)
            if (self.stop.requested or regroup_reason) and not stopping:
                engine.request_stop()
                stopping, deadline = True, now + grace
            if deadline is None and any(code is not None for code in codes.values()):
                deadline = now + grace
            running = [index for index, code in codes.items() if code is None]
            if deadline is not None and now > deadline:
                cause = "did not stop when asked" if stopping else "did not end when others had"
                reason = f"processes {running} {cause}, within {grace:g} s (elastic.grace), and were killed"
                return Outcome("failed", reason, monitor.highest_step, running[0], grace)
            if deadline is None and (outcome := detect_hang(running, monitor, self.settings, now=now)) is not None:
                return self.telemetry.explain_hang(outcome, now=now)
            self.sleep(POLL_SECONDS)


def record_event(directory: Path, event: str, **fields: object) -> None:
    """Write one line of the event log, between two epochs: nobody else writes then."""
    if (directory / "config.yaml").exists():  # else the processes failed before the run had a directory
        try:
            EventLog(directory).record(event, **fields)
        except UserError as error:  # a disk that takes no line must not hide what happened
            logger.warning("%s: %s (%s)", event, fields.get("reason"), error)


def judge_exit_codes(
    codes: Mapping[int, int | None], monitor: EpochMonitor, *, now: float, stopping: bool = False
) -> Outcome | None:
    """What the exit codes amount to; None while processes run and none has failed.

    Where they were asked to stop (`stopping`), one that SIGTERM ended had nothing to save yet: it was still starting.
    """
    if stopping:
        codes = {index: Preemption.exit_code if code in TERMINATED else code for index, code in codes.items()}
    if UserError.exit_code in codes.values():
        refused = next(index for index, code in codes.items() if code == UserError.exit_code)
        reason = f"process {refused} refused the configuration (see above)"
        return Outcome("refused", reason, monitor.highest_step, refused)
    if failed := {index: code for index, code in codes.items() if code not in (None, 0, Preemption.exit_code)}:
        reports = monitor.reports
        corrupt = [index for index in failed if index in reports and reports[index].phase == CORRUPT_PHASE]
        suspect = min(corrupt, default=policies.find_failed_process(failed))
        last_news = reports[suspect].changed_at if suspect in reports else monitor.started
        reason = f"processes failed with these exit codes: {failed}"
        return Outcome("failed", reason, monitor.highest_step, suspect, now - last_news)
    if None in codes.values():
        return None
    kind = "preempted" if Preemption.exit_code in codes.values() else "done"
    return Outcome(kind, f"processes ended with these exit codes: {dict(codes)}", monitor.highest_step)
