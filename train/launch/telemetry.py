"""What the supervisor sees of the processes of an epoch, and what it makes of it: who is slow, why all hang. JAX-free.

Slow processes are told at once and never killed: that is the reader's decision. All of it stands in `detection.json` of
the run directory, the supervisor's own file (the journal is the trainers' while they run), for the report's heat maps.
"""

import json
import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.rendezvous import Room
from .network_probe import Links, culprits
from .restart_policies import Outcome
from .straggler_detection import WAIT, Diagnosis, Observed, hanging, slow, told

FILE = "detection.json"
RECENT, FEWEST = 16, 6  # steps that "recently" means; samples before anything is said
LOOK = 2.0  # seconds between two judgements and between two writings
REPEAT = 600.0  # seconds before the same is said again
MEASURE = 60.0  # seconds between two measurements of the links
COLUMNS = 64  # of the heat map; twice as many are merged by pairs

logger = logging.getLogger(__name__)


@dataclass
class Process:
    """What is known of one process."""

    step: int
    doing: str
    heard: float  # when its last sign of life came
    beats: int
    spent: dict[str, float]  # seconds by what was done, when `step` was new
    own: deque = field(default_factory=lambda: deque(maxlen=RECENT))  # seconds a step by itself
    took: deque = field(default_factory=lambda: deque(maxlen=RECENT))  # seconds a step

    def observed(self, now: float) -> Observed:
        """As the detection wants it."""
        known = len(self.own) >= FEWEST
        own, took = (statistics.median(self.own), statistics.median(self.took)) if known else (None, None)
        return Observed(self.step, self.doing, now - self.heard, own, took)


class Telemetry:
    """Looks at the rendezvous. `directory`: the run's; None: nothing is written. `measure`: of the links, if any."""

    def __init__(self, directory: Path | None = None, measure: Callable[[], Links | None] = lambda: None) -> None:
        self._directory, self._measure = directory, measure
        self._epoch = 0
        self._slots: Sequence[int] = ()  # of the epoch's processes
        self._processes: dict[int, Process] = {}
        self._usual: float | None = None  # seconds of a step at the beginning
        self._judged, self._measured, self._links = 0.0, -MEASURE, None
        self._said: dict[tuple, float] = {}
        self.diagnoses: list[dict[str, Any]] = []
        self._columns: list[dict[str, Any]] = []  # of the heat map: {step, own: [seconds a step, by slot, if any]}
        self._width = 1  # steps of a column

    def measure(self, now: float) -> Links | None:
        """The links, measured now or a minute ago at most."""
        if now - self._measured >= MEASURE:
            self._links, self._measured = self._measure(), now
        return self._links

    def begin(self) -> None:
        """Measure the links before anything runs, and say which are slow."""
        links = self.measure(time.monotonic())
        for culprit in culprits(links) if links is not None else ():
            logger.warning("%s", told(culprit))

    def look(self, room: Room, epoch: int, *, slots: Sequence[int], now: float) -> None:
        """Take in what the processes, in `slots`, told since the last look; now and then say what is slow."""
        if epoch != self._epoch:
            self._epoch, self._processes, self._usual, self._said = epoch, {}, None, {}
        if tuple(slots) != tuple(self._slots):
            self._slots, self._links, self._measured = slots, None, -MEASURE  # other machines, other links
        for name, one in room.membership.members.items():
            whose, _, number = name.partition("/")
            if whose == str(epoch) and number.isdigit() and "spent" in one.info:
                self._take(int(number), one.info, now)
        if now - self._judged >= LOOK and self._processes:
            self._judged = now
            self._judge(now)
            self.write()

    def _take(self, number: int, info: Any, now: float) -> None:
        step, spent, beats = int(info["step"]), dict(info["spent"]), int(info["beats"])
        old = self._processes.get(number)
        if old is None:
            self._processes[number] = Process(step, info["doing"], now, beats, spent)
            return
        if beats != old.beats:
            old.heard, old.beats = now, beats
        old.doing = info["doing"]
        if step > old.step:
            took = sum(spent.values()) - sum(old.spent.values())
            waited = spent.get(WAIT, 0.0) - old.spent.get(WAIT, 0.0)
            if old.step > 0:  # what came before the first step is no step's
                old.took.append(took / (step - old.step))
                old.own.append((took - waited) / (step - old.step))
            old.step, old.spent = step, spent
            self._column()

    def _column(self) -> None:
        """A column of the heat map, once every process has come far enough."""
        step = min(one.step for one in self._processes.values())
        if step < (self._columns[-1]["step"] if self._columns else 0) + self._width:
            return
        if all(one.own for one in self._processes.values()):
            own: list[float | None] = [None] * (max(self._slots) + 1)
            for number, one in self._processes.items():
                own[self._slots[number]] = round(statistics.fmean(one.own), 4)
            self._columns.append({"step": step, "own": own})
        if len(self._columns) >= 2 * COLUMNS:
            self._columns, self._width = self._columns[1::2], 2 * self._width

    def _judge(self, now: float) -> None:
        seen = self.seen(now)
        if self._usual is None and all(one.took is not None for one in seen.values()):
            self._usual = statistics.median(one.took for one in seen.values())
        diagnosis = slow(seen, usual=self._usual)
        if diagnosis is not None and diagnosis.communication:
            diagnosis = slow(seen, usual=self._usual, links=self.measure(now))
        if diagnosis is None:
            return
        key = (diagnosis.communication, tuple(self._slots[number] for number in diagnosis.suspects))
        if now - self._said.get(key, -REPEAT) >= REPEAT:
            self._said[key] = now
            self.say(diagnosis)

    def seen(self, now: float) -> dict[int, Observed]:
        """Every process, for the detection."""
        return {number: one.observed(now) for number, one in sorted(self._processes.items())}

    def say(self, diagnosis: Diagnosis) -> None:
        """Tell whoever reads, now and in the report."""
        logger.warning("epoch %d: %s", self._epoch, diagnosis)
        step = max((one.step for one in self._processes.values()), default=0)
        slots = [self._slots[number] for number in diagnosis.suspects]
        told = {"time": time.time(), "epoch": self._epoch, "step": step, **asdict(diagnosis), "slots": slots}
        self.diagnoses.append(told)

    def explained(self, outcome: Outcome, *, now: float) -> Outcome:
        """The outcome of a hang with its syndrome, and the suspect that it points to."""
        diagnosis = hanging(self.seen(now))
        if diagnosis is not None and diagnosis.communication:
            diagnosis = hanging(self.seen(now), self.measure(now))
        if diagnosis is None:
            return outcome
        self.say(diagnosis)
        self.write()
        suspect = diagnosis.suspects[0] if diagnosis.suspects else outcome.suspect
        where = "communication" if diagnosis.communication else "not communication"
        reason = f"{outcome.reason} ({diagnosis})"
        return replace(outcome, suspect=suspect, reason=reason, syndrome=f"hang, {where}")

    def write(self) -> None:
        """`detection.json`, anew, once the run has a directory."""
        if self._directory is None or not (self._directory / "config.yaml").exists():
            return
        words = {
            "epoch": self._epoch,
            "heat": self._columns,
            "links": None if self._links is None else links_told(self._links),
            "diagnoses": self.diagnoses,
        }
        draft = self._directory / f".{FILE}.{os.getpid()}"
        try:
            draft.write_text(json.dumps(words))
            os.replace(draft, self._directory / FILE)
        except OSError as error:  # a full disk must not stop the supervisor
            logger.warning("%s: %s", draft, error)


def links_told(links: Links) -> dict[str, Any]:
    """Matrices as lists; None where there is no number."""
    return {
        name: [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]
        for name, matrix in asdict(links).items()
    }
