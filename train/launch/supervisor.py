"""The supervisor: starts the processes of a run, watches their steps, and starts all again when one dies or hangs.

It stands outside the processes, so that any of them may die, the first included, and it trusts steps, not liveness: a
process waiting for a dead peer is alive for ever. Each start is an epoch: its own coordination service, its own names,
and a fence against processes of earlier ones. JAX-free.

    done        every process ended with 0
    preempted   asked to stop, and saved in time: exit code 75, start me again
    refused     a process found the request wrong: exit code 2, no restart would help
    failed      a process died, or hung: kill all, wait, start all; give up after too many
    regroup     asked by the supervisor itself to stop: slots were drained, or a larger mesh fits again
"""

import logging
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ...configs.errors import MeshwrightError, Preempted, UserError
from ...configs.sections.fault_tolerance import ElasticConfig
from ..core.event_log import Journal
from ..core.fence import Fence, current
from ..core.heartbeat import ERRS
from ..core.rendezvous import Room
from .drain import drained
from .mesh_options import Formation, Team
from .regroup import Regroup, change
from .restart_policies import Failure, Outcome, Report, culprit, gives_up, patience, pause, struck, suspect
from .telemetry import Telemetry

TICK = 0.1  # seconds between two looks
TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes of a process that SIGTERM ended

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Where processes run: starts, signals and polls them. All of one epoch are started before any is polled."""

    processes: int  # of the epoch; before the first one, as many as were asked for

    def slots(self) -> Collection[int]:
        """The slots in which a process could be started now; a lost one is missing, a replacement has its number."""

    def gather(self, slots: Collection[int]) -> None:
        """Have a place for a process in each of `slots`. Raises MeshwrightError where machines do not come in time."""

    def start(self, epoch: int, *, slots: Sequence[int], words: Sequence[str]) -> None:
        """Start a process of `epoch` in each of `slots`, with `words` after the command, and what coordinates them."""

    def poll(self, number: int) -> int | None:
        """Exit code of a process; None while it runs."""

    def broken(self) -> str | None:
        """What failed beside the processes; None where all is well."""

    def ask_to_stop(self) -> None:
        """SIGTERM to all that run."""

    def kill(self) -> None:
        """SIGKILL to all that are left, with everything they started; returns once they have ended."""


class Stop(Protocol):
    """Whether somebody asked the supervisor itself to stop."""

    asked: bool


@dataclass
class Watch:
    """What is known of the processes of one epoch."""

    started: float
    reports: dict[int, Report] = field(default_factory=dict)
    beats: dict[int, int] = field(default_factory=dict)  # heartbeats, by process
    durations: list[float] = field(default_factory=list)  # seconds a step, from each process's reports

    def look(self, room: Room, epoch: int, *, now: float) -> None:
        """Take in what the processes told since the last look."""
        for name, one in room.membership.members.items():
            whose, _, number = name.partition("/")
            if whose != str(epoch) or "step" not in one.info:
                continue
            old, step, phase = self.reports.get(int(number)), int(one.info["step"]), str(one.info["phase"])
            beats = int(one.info["beats"])
            heard = old.heard if old is not None and beats == self.beats.get(int(number)) else now
            self.beats[int(number)] = beats
            if old is not None and (step, phase) == (old.step, old.phase):
                self.reports[int(number)] = replace(old, heard=heard)
                continue
            if old is not None and step > old.step and old.phase != "start":
                self.durations.append((now - old.time) / (step - old.step))
            self.reports[int(number)] = Report(step, phase, now, now)

    def silence(self, running: Sequence[int], *, now: float) -> float:
        """Seconds since the last news of the process that has been silent longest, among those that run."""
        return now - min((self.reports[n].time if n in self.reports else self.started) for n in running)

    @property
    def stepping(self) -> bool:
        """Whether steps are being made: a process that still starts would not answer a request to stop."""
        return any(report.phase == "step" for report in self.reports.values())

    @property
    def compiling(self) -> bool:
        """Whether all of them do what needs another program than a step's, as at the start."""
        return all(report.phase in ("start", "measure") for report in self.reports.values())

    @property
    def reached(self) -> int:
        """The highest step any process reported."""
        return max((report.step for report in self.reports.values()), default=0)


def supervise(
    engine: Engine,
    *,
    settings: ElasticConfig,
    directory: Path,
    room: Room,
    stop: Stop,
    formations: Sequence[Formation] = (),
    telemetry: Telemetry | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run until every process ended well. `directory` is the run's, `room` where its processes report.

    `formations` are what it may run as, the preferred first (default: as many processes as the engine has). `telemetry`
    looks on and says what is slow, or why something hangs. Raises Preempted where all stopped on request, UserError
    where the request itself was wrong, MeshwrightError where it gave up.
    """
    epoch, failures = current(directory), []
    regroup = Regroup(
        tuple(formations) or (Formation(engine.processes),),
        slots=engine.slots,
        drained=lambda: drained(directory),
        struck=lambda: struck(failures, settings, now=clock()),
        replace=settings.replace,
        settle=settings.settle,
        patience=max(settings.replace, settings.start_timeout),
    )
    why = "started"
    while True:
        form_up(regroup, directory, why, stop=stop, clock=clock, sleep=sleep)
        epoch = max(epoch, current(directory)) + 1
        if directory.exists():
            Fence(directory, epoch).claim()  # before the new ones start: old ones may still be writing
        try:
            engine.start(epoch, slots=regroup.present.slots, words=regroup.present.formation.words)
            outcome = watched(
                engine,
                epoch,
                settings=settings,
                room=room,
                stop=stop,
                regroup=regroup,
                telemetry=telemetry,
                clock=clock,
                sleep=sleep,
            )
        finally:
            engine.kill()
        why = outcome.reason
        if outcome.kind == "done":
            return
        if outcome.kind in ("preempted", "regroup") and stop.asked:
            raise Preempted("stopped on request, state saved; run the same command to go on")
        if outcome.kind == "refused":
            raise UserError(outcome.reason)
        if outcome.kind == "regroup":
            tell(directory, "regroup", outcome, epoch=epoch)
            continue
        if outcome.kind == "failed":
            slot = None if outcome.suspect is None else regroup.present.slots[outcome.suspect]
            failures.append(Failure(clock(), outcome.reached, slot))
        if stop.asked or gives_up(failures, settings, now=clock()):
            tell(directory, "give-up", outcome, epoch=epoch, failures=len(failures))
            raise MeshwrightError(ending(outcome, failures, stop=stop))
        seconds = pause(failures, settings) if outcome.kind == "failed" else settings.backoff
        tell(directory, "restart", outcome, epoch=epoch, pause_seconds=seconds)
        sleep(seconds)


def form_up(
    regroup: Regroup,
    directory: Path,
    why: str,
    *,
    stop: Stop,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Choose who takes part in the next epoch, and journal a change.

    Raises MeshwrightError where what is left fits no mesh, Preempted where asked to stop meanwhile.
    """
    began, before = clock(), regroup.present
    found = regroup.form(enough=lambda: stop.asked, clock=clock, sleep=sleep)
    if stop.asked and before is not None:
        raise Preempted("stopped on request between two epochs; run the same command to go on")
    if found is None:
        raise MeshwrightError(
            f"slots {sorted(regroup.slots())} are left, {sorted(regroup.drained())} are drained, and no mesh fits what "
            f"there is ({why}); add one to elastic.meshes, or bring hosts back and run the same command"
        )
    regroup.present = found
    event = change(before or Team(regroup.candidates[0], found.slots), found, candidates=regroup.candidates)
    if event is None:
        return
    write(
        directory,
        event,
        reason=why,
        processes=len(found.slots),
        mesh=found.formation.mesh,
        slots=list(found.slots),
        waited_seconds=clock() - began,
    )


def ending(outcome: Outcome, failures: Sequence[Failure], *, stop: Stop) -> str:
    """Why the supervisor gives up."""
    if stop.asked or len(failures) == 1:
        return outcome.reason
    return f"{outcome.reason}; gave up after {len(failures)} failures (elastic.restarts)"


def tell(directory: Path, event: str, outcome: Outcome, **fields: object) -> None:
    """Journal what happened to the processes."""
    write(
        directory,
        event,
        reason=outcome.reason,
        suspect=outcome.suspect,
        step=outcome.reached,
        detect_seconds=outcome.detected,
        **({"syndrome": outcome.syndrome} if outcome.syndrome else {}),
        **fields,
    )


def write(directory: Path, event: str, **fields: object) -> None:
    """One line of the journal, between two epochs: nobody else writes then."""
    if (directory / "config.yaml").exists():  # else they failed before the run had a directory
        try:
            Journal(directory).record(event, **fields)
        except UserError as error:  # a disk that takes no line must not hide what happened
            logger.warning("%s: %s (%s)", event, fields.get("reason"), error)


def watched(
    engine: Engine,
    epoch: int,
    *,
    settings: ElasticConfig,
    room: Room,
    stop: Stop,
    regroup: Regroup,
    telemetry: Telemetry | None,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Outcome:
    """Look at the processes of one epoch until it is over; some may still be running then."""
    watch, telemetry = Watch(clock()), telemetry or Telemetry()
    deadline: float | None = None  # by which all must have ended, once one has or was asked to
    told = False
    why: str | None = None  # they were asked to stop, to form up anew
    while True:
        now = clock()
        watch.look(room, epoch, now=now)
        telemetry.look(room, epoch, slots=regroup.present.slots, now=now)
        codes = {number: engine.poll(number) for number in range(engine.processes)}
        if (outcome := judged(codes, watch, now=now, asked=told)) is not None:
            return replace(outcome, kind="regroup", reason=why) if why and outcome.kind == "preempted" else outcome
        if (broke := engine.broken()) is not None:
            return Outcome("failed", broke, watch.reached)
        if deadline is None and watch.stepping:
            why = regroup.reason(now=now)
        if (stop.asked or why) and not told:
            engine.ask_to_stop()
            told, deadline = True, now + settings.grace
        if deadline is None and any(code is not None for code in codes.values()):
            deadline = now + settings.grace
        running = [number for number, code in codes.items() if code is None]
        if deadline is not None and now > deadline:
            return overdue(running, watch, settings=settings, asked=told)
        if deadline is None and (outcome := hung(running, engine, watch, settings=settings, now=now)) is not None:
            return telemetry.explained(outcome, now=now)
        sleep(TICK)


def judged(codes: Mapping[int, int | None], watch: Watch, *, now: float, asked: bool = False) -> Outcome | None:
    """What the exit codes amount to; None while processes run and none has failed.

    Where they were `asked` to stop, one that SIGTERM ended had nothing to save yet: it was still starting.
    """
    if asked:
        codes = {number: Preempted.exit_code if code in TERMINATED else code for number, code in codes.items()}
    if UserError.exit_code in codes.values():
        refused = next(number for number, code in codes.items() if code == UserError.exit_code)
        return Outcome("refused", f"process {refused} refused the configuration (see above)", watch.reached, refused)
    if failed := {number: code for number, code in codes.items() if code not in (None, 0, Preempted.exit_code)}:
        errs = [number for number in failed if number in watch.reports and watch.reports[number].phase == ERRS]
        first = min(errs, default=culprit(failed))
        last = watch.reports[first].time if first in watch.reports else watch.started
        reason = f"processes failed with these exit codes: {failed}"
        return Outcome("failed", reason, watch.reached, first, now - last)
    if None in codes.values():
        return None
    kind = "preempted" if Preempted.exit_code in codes.values() else "done"
    return Outcome(kind, f"processes ended with these exit codes: {dict(codes)}", watch.reached)


def overdue(running: Sequence[int], watch: Watch, *, settings: ElasticConfig, asked: bool) -> Outcome:
    """Some ended or were asked to, and `grace` is over."""
    why = "did not stop when asked" if asked else "did not end when others had"
    reason = f"processes {list(running)} {why}, within {settings.grace:g} s (elastic.grace), and were killed"
    return Outcome("failed", reason, watch.reached, running[0], settings.grace)


def hung(
    running: Sequence[int], engine: Engine, watch: Watch, *, settings: ElasticConfig, now: float
) -> Outcome | None:
    """The outcome where no step was made for too long; None where all is well."""
    limit, silence = patience(watch.durations, settings), watch.silence(running, now=now)
    if watch.compiling:
        limit = max(limit, settings.start_timeout)
    if silence <= limit:
        return None
    who = suspect(watch.reports, processes=engine.processes)
    at = f"at step {watch.reports[who].step} ({watch.reports[who].phase})" if who in watch.reports else "never reported"
    reason = f"no step for {silence:.0f} s (limit {limit:.0f} s): process {who} hangs, {at}"
    return Outcome("failed", reason, watch.reached, who, silence)
