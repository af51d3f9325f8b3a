"""The supervisor: starts the processes of a run, watches their steps, and starts all again when one dies or hangs.

It stands outside the processes, so that any of them may die, the first included, and it trusts steps, not liveness: a
process waiting for a dead peer is alive for ever. Each start is an epoch: its own coordination service, its own names,
and a fence against processes of earlier ones. JAX-free.

    done        every process ended with 0
    preempted   asked to stop, and saved in time: exit code 75, start me again
    refused     a process found the request wrong: exit code 2, no restart would help
    failed      a process died, or hung: kill all, wait, start all; give up after too many
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ...configs.elastic import ElasticConfig
from ...configs.errors import MeshwrightError, Preempted, UserError
from ..report.journal import Journal
from .decisions import Failure, Report, gives_up, patience, pause, suspect
from .fence import Fence, current
from .rendezvous import Room
from .telemetry import Telemetry

TICK = 0.1  # seconds between two looks


class Engine(Protocol):
    """Where processes run: starts, signals and polls them. All of one epoch are started before any is polled."""

    processes: int

    def start(self, epoch: int) -> None:
        """Start every process of `epoch`, and whatever coordinates them."""

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


@dataclass(frozen=True)
class Outcome:
    """How an epoch ended."""

    kind: str  # done | preempted | refused | failed
    reason: str
    reached: int = 0  # the highest step reported
    suspect: int | None = None
    detected: float = 0.0  # seconds from the last news of the suspect to this outcome
    syndrome: str = ""  # of a hang: `hang, communication` or `hang, not communication`


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
    telemetry: Telemetry | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run until every process ended well. `directory` is the run's, `room` where its processes report.

    `telemetry` looks on and says what is slow, or why something hangs.

    Raises Preempted where all stopped on request, UserError where the request itself was wrong, MeshwrightError where
    it gave up.
    """
    epoch, failures = current(directory), []
    while True:
        epoch = max(epoch, current(directory)) + 1
        if directory.exists():
            Fence(directory, epoch).claim()  # before the new ones start: old ones may still be writing
        try:
            engine.start(epoch)
            outcome = watched(
                engine, epoch, settings=settings, room=room, stop=stop, telemetry=telemetry, clock=clock, sleep=sleep
            )
        finally:
            engine.kill()
        if outcome.kind == "done":
            return
        if outcome.kind == "preempted" and stop.asked:
            raise Preempted("stopped on request, state saved; run the same command to go on")
        if outcome.kind == "refused":
            raise UserError(outcome.reason)
        if outcome.kind == "failed":
            failures.append(Failure(clock(), outcome.reached))
        if stop.asked or gives_up(failures, settings, now=clock()):
            tell(directory, "give-up", outcome, epoch=epoch, failures=len(failures))
            raise MeshwrightError(ending(outcome, failures, stop=stop))
        seconds = pause(failures, settings) if outcome.kind == "failed" else settings.backoff
        tell(directory, "restart", outcome, epoch=epoch, pause_seconds=seconds)
        sleep(seconds)


def ending(outcome: Outcome, failures: Sequence[Failure], *, stop: Stop) -> str:
    """Why the supervisor gives up."""
    if stop.asked or len(failures) == 1:
        return outcome.reason
    return f"{outcome.reason}; gave up after {len(failures)} failures (elastic.restarts)"


def tell(directory: Path, event: str, outcome: Outcome, **fields: object) -> None:
    """Journal what happened to the processes, once they have ended: nobody else writes then."""
    if not (directory / "config.yaml").exists():
        return  # they failed before the run had a directory
    Journal(directory).record(
        event,
        reason=outcome.reason,
        suspect=outcome.suspect,
        step=outcome.reached,
        detect_seconds=outcome.detected,
        **({"syndrome": outcome.syndrome} if outcome.syndrome else {}),
        **fields,
    )


def watched(
    engine: Engine,
    epoch: int,
    *,
    settings: ElasticConfig,
    room: Room,
    stop: Stop,
    telemetry: Telemetry | None,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Outcome:
    """Look at the processes of one epoch until it is over; some may still be running then."""
    watch, telemetry = Watch(clock()), telemetry or Telemetry()
    deadline: float | None = None  # by which all must have ended, once one has or was asked to
    told = False
    while True:
        now = clock()
        watch.look(room, epoch, now=now)
        telemetry.look(room, epoch, now=now)
        codes = {number: engine.poll(number) for number in range(engine.processes)}
        if (outcome := judged(codes, watch, now=now)) is not None:
            return outcome
        if (why := engine.broken()) is not None:
            return Outcome("failed", why, watch.reached)
        if stop.asked and not told:
            engine.ask_to_stop()
            told, deadline = True, now + settings.grace
        if deadline is None and any(code is not None for code in codes.values()):
            deadline = now + settings.grace
        running = [number for number, code in codes.items() if code is None]
        if deadline is not None and now > deadline:
            return overdue(running, watch, settings=settings, asked=stop.asked)
        if deadline is None and (outcome := hung(running, engine, watch, settings=settings, now=now)) is not None:
            return telemetry.explained(outcome, now=now)
        sleep(TICK)


def judged(codes: Mapping[int, int | None], watch: Watch, *, now: float) -> Outcome | None:
    """What the exit codes amount to; None while processes run and none has failed."""
    if UserError.exit_code in codes.values():
        refused = next(number for number, code in codes.items() if code == UserError.exit_code)
        return Outcome("refused", f"process {refused} refused the configuration (see above)", watch.reached, refused)
    if failed := {number: code for number, code in codes.items() if code not in (None, 0, Preempted.exit_code)}:
        first = min(failed, key=lambda number: failed[number] > 0)  # what was killed, before what missed it
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
    if silence <= limit:
        return None
    who = suspect(watch.reports, processes=engine.processes)
    at = f"at step {watch.reports[who].step} ({watch.reports[who].phase})" if who in watch.reports else "never reported"
    reason = f"no step for {silence:.0f} s (limit {limit:.0f} s): process {who} hangs, {at}"
    return Outcome("failed", reason, watch.reached, who, silence)
