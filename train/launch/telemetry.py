"""What the supervisor sees of the processes of an epoch, and what follows: who is slow, why all hang. JAX-free.

Slow processes are logged at once and never killed: that is the reader's decision. All of it stands in `detection.json`
of the run directory, the supervisor's own file (the event log is the trainers' while they run), for the report's heat
maps.
"""

import json
import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.rendezvous import MembershipStore
from . import straggler_detection
from .network_probe import Links, find_link_faults
from .restart_policies import Outcome
from .straggler_detection import WAIT, Diagnosis, ProcessActivity, describe_fault

FILE = "detection.json"
RECENT_STEPS, MIN_SAMPLES = 16, 6  # steps that "recently" means; samples before anything is said
DIAGNOSE_SECONDS = 2.0  # between two diagnoses and between two writings
REPEAT_SECONDS = 600.0  # before the same diagnosis is recorded again
MEASURE_SECONDS = 60.0  # between two measurements of the links
COLUMNS = 64  # of the heat map; twice as many are merged by pairs

logger = logging.getLogger(__name__)


@dataclass
class ProcessTimings:
    """What is known of one process."""

    step: int
    activity: str
    heartbeat_at: float
    beats: int
    seconds_by_activity: dict[str, float]  # so far, when `step` was new
    busy_seconds: deque = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))  # a step by itself
    step_seconds: deque = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))  # a step

    def summary(self, now: float) -> ProcessActivity:
        """The medians of recent steps, once there are enough of them."""
        activity = ProcessActivity(self.step, self.activity, now - self.heartbeat_at)
        if len(self.busy_seconds) < MIN_SAMPLES:
            return activity
        medians = map(statistics.median, (self.busy_seconds, self.step_seconds))
        return replace(activity, **dict(zip(("busy_seconds", "step_seconds"), medians, strict=True)))


class Telemetry:
    """Collects the timings that processes report, and diagnoses them.

    `directory` is the run's; None: nothing is written. `measure` measures the links, or returns None.
    """

    def __init__(self, directory: Path | None = None, measure: Callable[[], Links | None] = lambda: None) -> None:
        self._directory, self._measure = directory, measure
        self._epoch = 0
        self._slots: Sequence[int] = ()  # of the epoch's processes
        self._processes: dict[int, ProcessTimings] = {}
        self._usual_step: float | None = None  # seconds of a step at the beginning
        self._diagnosed_at, self._measured_at, self._links = 0.0, -MEASURE_SECONDS, None
        self._recorded_at: dict[tuple, float] = {}
        self.diagnoses: list[dict[str, Any]] = []
        self._columns: list[dict[str, Any]] = []  # of the heat map: {step, own: [busy seconds a step, by slot, if any]}
        self._column_steps = 1  # steps of a column

    def measure(self, now: float) -> Links | None:
        """The links, measured now or a minute ago at most."""
        if now - self._measured_at >= MEASURE_SECONDS:
            self._links, self._measured_at = self._measure(), now
        return self._links

    def check_links(self) -> None:
        """Measure the links before anything runs, and log which are slow."""
        links = self.measure(time.monotonic())
        for fault in find_link_faults(links) if links is not None else ():
            logger.warning("%s", describe_fault(fault))

    def update(self, store: MembershipStore, epoch: int, *, slots: Sequence[int], now: float) -> None:
        """Read what the processes, in `slots`, reported since the last call; now and then diagnose what is slow."""
        if epoch != self._epoch:
            self._epoch, self._processes, self._usual_step, self._recorded_at = epoch, {}, None, {}
        if tuple(slots) != tuple(self._slots):
            self._slots, self._links, self._measured_at = slots, None, -MEASURE_SECONDS  # other machines, other links
        for index, info in process_reports(store, epoch).items():
            if "spent" in info:
                self._update_process(index, info, now)
        if now - self._diagnosed_at >= DIAGNOSE_SECONDS and self._processes:
            self._diagnosed_at = now
            self._diagnose(now)
            self.write()

    def _update_process(self, index: int, info: Any, now: float) -> None:
        step, seconds, beats = int(info["step"]), dict(info["spent"]), int(info["beats"])
        process = self._processes.get(index)
        if process is None:
            self._processes[index] = ProcessTimings(step, info["doing"], now, beats, seconds)
            return
        if beats != process.beats:
            process.heartbeat_at, process.beats = now, beats
        process.activity = info["doing"]
        if step > process.step:
            elapsed = sum(seconds.values()) - sum(process.seconds_by_activity.values())
            waited = seconds.get(WAIT, 0.0) - process.seconds_by_activity.get(WAIT, 0.0)
            if process.step > 0:  # the time before the first step belongs to no step
                process.step_seconds.append(elapsed / (step - process.step))
                process.busy_seconds.append((elapsed - waited) / (step - process.step))
            process.step, process.seconds_by_activity = step, seconds
            self._append_column()

    def _append_column(self) -> None:
        """Add a column to the heat map, once every process has come far enough."""
        step = min(process.step for process in self._processes.values())
        if step < (self._columns[-1]["step"] if self._columns else 0) + self._column_steps:
            return
        if all(process.busy_seconds for process in self._processes.values()):
            by_slot: list[float | None] = [None] * (max(self._slots) + 1)
            for index, process in self._processes.items():
                by_slot[self._slots[index]] = round(statistics.fmean(process.busy_seconds), 4)
            self._columns.append({"step": step, "own": by_slot})
        if len(self._columns) >= 2 * COLUMNS:
            self._columns, self._column_steps = self._columns[1::2], 2 * self._column_steps

    def _diagnose(self, now: float) -> None:
        processes = self._summaries(now)
        if self._usual_step is None and all(process.step_seconds is not None for process in processes.values()):
            self._usual_step = statistics.median(process.step_seconds for process in processes.values())
        diagnosis = straggler_detection.diagnose_slowdown(processes, usual=self._usual_step)
        if diagnosis is not None and diagnosis.communication:
            diagnosis = straggler_detection.diagnose_slowdown(
                processes, usual=self._usual_step, links=self.measure(now)
            )
        if diagnosis is None:
            return
        key = (diagnosis.communication, tuple(self._slots[index] for index in diagnosis.suspects))
        if now - self._recorded_at.get(key, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._recorded_at[key] = now
            self._record(diagnosis)

    def _summaries(self, now: float) -> dict[int, ProcessActivity]:
        return {index: process.summary(now) for index, process in sorted(self._processes.items())}

    def _record(self, diagnosis: Diagnosis) -> None:
        """Log a diagnosis, and keep it for the report."""
        logger.warning("epoch %d: %s", self._epoch, diagnosis)
        step = max((process.step for process in self._processes.values()), default=0)
        slots = [self._slots[index] for index in diagnosis.suspects]
        self.diagnoses.append(
            {"time": time.time(), "epoch": self._epoch, "step": step, **asdict(diagnosis), "slots": slots}
        )

    def explain_hang(self, outcome: Outcome, *, now: float) -> Outcome:
        """The outcome of a hang with its syndrome, and the suspect that the syndrome points to."""
        processes = self._summaries(now)
        diagnosis = straggler_detection.diagnose_hang(processes)
        if diagnosis is not None and diagnosis.communication:
            diagnosis = straggler_detection.diagnose_hang(processes, self.measure(now))
        if diagnosis is None:
            return outcome
        self._record(diagnosis)
        self.write()
        suspect = diagnosis.suspects[0] if diagnosis.suspects else outcome.suspect
        reason = f"{outcome.reason} ({diagnosis})"
        return replace(outcome, suspect=suspect, reason=reason, syndrome=diagnosis.syndrome)

    def write(self) -> None:
        """Replace `detection.json`, once the run has a directory."""
        if self._directory is None or not (self._directory / "config.yaml").exists():
            return
        content = {
            "epoch": self._epoch,
            "heat": self._columns,
            "links": None if self._links is None else links_to_json(self._links),
            "diagnoses": self.diagnoses,
        }
        draft = self._directory / f".{FILE}.{os.getpid()}"
        try:
            draft.write_text(json.dumps(content))
            os.replace(draft, self._directory / FILE)
        except OSError as error:  # a full disk must not stop the supervisor
            logger.warning("%s: %s", draft, error)


def process_reports(store: MembershipStore, epoch: int) -> dict[int, Mapping[str, Any]]:
    """What each process of an epoch last reported (`core/heartbeat.py`); those that never did are missing."""
    prefix = f"{epoch}/"
    infos = {name: member.info for name, member in store.membership.members.items() if name.startswith(prefix)}
    return {int(name.removeprefix(prefix)): info for name, info in infos.items() if "step" in info}


def links_to_json(links: Links) -> dict[str, Any]:
    """Matrices as lists; None where a value is not finite."""
    return {
        name: [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]
        for name, matrix in asdict(links).items()
    }
