"""The training loop: feed, step, meet; between two steps save, evaluate, stop. It never waits for the device.

    state = Loop(...).run(state, start)

The metrics of a step are read while the next one runs.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ..configs.errors import MeshwrightError, Preempted
from ..parallel.outer.traffic import sent
from ..parallel.state import TrainState
from .checkpoint_schedule import Pace
from .checkpointer import Saving
from .core.heartbeat import Progress
from .core.sample_log import Ledger
from .data.assemble import Data
from .data.batches import batches
from .engine.host_data import Share, to_devices
from .engine.program import Program
from .engine.replicas import Meet, on_host
from .engine.step import Step
from .infer.evaluator import Assessment
from .islands.sync import Meetings, Moved
from .launch.straggler_detection import WAIT
from .metrics.metrics_logger import Telling
from .metrics.throughput import Meter
from .preemption import StopRequest
from .profiling import Profile


@dataclass
class Loop:
    """The loop and what it is told by and tells."""

    program: Program
    data: Data
    reread: Callable[[int], Data]  # `data`, with what is noted beforehand of what is read after an update
    share: Share
    directory: Path
    step: Step
    meet: Meet
    meetings: Meetings | None  # of an island with the others; it is `meet`
    assess: Assessment | None  # None: nothing to evaluate
    saving: Saving
    pace: Pace
    ledger: Ledger
    stop: StopRequest
    progress: Progress
    meter: Meter
    told: Telling
    spent: Callable[[int], dict[str, float]]  # of a private run, after a step

    def run(self, state: TrainState, start: int) -> TrainState:
        """From update `start` to the last, saved and evaluated. Raises Preempted, the state saved, where asked to."""
        config = self.program.config
        if self.assess is not None and config.evaluation.start and start == 0:
            self.evaluate(state, 0)
            self.meter.restart()
        if self.meetings and start < config.steps:
            state, begun = self.meetings.begin(state, start)
            if begun < start:
                self.gone_back(state, begun)
            start = begun
        state = self.to_the_end(state, start)
        self.progress.report(config.steps, "finish")
        if config.steps > start or config.steps not in self.saving.storage.steps:
            self.saving.last(state, config.steps, samples=config.steps * config.data.global_batch)
        if self.assess is not None:
            self.evaluate(state, config.steps)
        if self.meetings:
            self.meetings.finish(state, config.steps)
        return state

    def gone_back(self, state: TrainState, step: int) -> None:
        """The others are at `step`, and this island was further: what it is about to read again is noted too."""
        self.saving.go_back(state, step, samples=step * self.program.config.data.global_batch)
        self.data = self.reread(step)

    def to_the_end(self, state: TrainState, start: int) -> TrainState:
        """`steps` from wherever the other islands are."""
        while True:
            try:
                return self.steps(state, start)
            except Moved as moved:
                state, start = moved.state, moved.step

    def steps(self, state: TrainState, start: int) -> TrainState:
        """From update `start` to the last; metrics are read one step behind."""
        config = self.program.config
        pending = None
        self.ledger.began(start)
        self.pace.began(start)
        profile = Profile(config.logging.profile, self.directory)
        with closing(profile), closing(self.batches(start)) as feed:
            for number in range(start + 1, config.steps + 1):
                with profile.step(number):
                    self.progress.enters("input")
                    with self.meter.host():
                        rows = next(feed)
                        self.ledger.fed(number, rows, first=self.share.first(number - 1))
                        batch = to_devices(rows, config, self.program.mesh)
                    self.progress.enters(WAIT)
                    state, metrics = self.step(state, batch)
                    self.read(pending)
                    pending = (number, metrics)
                    try:
                        state = self.meet(state, number)  # may wait for others, which is this update's time
                    except Moved:  # the updates up to here were made, whatever comes of them
                        self.read(pending)
                        raise
                self.progress.report(number - 1)  # whose metrics have been read: it is done
                self.progress.enters("host")
                self.saving.poll()
                stopping = self.stop.requested(number) and number < config.steps
                if stopping or self.pauses(number):
                    self.progress.enters(WAIT)
                    self.read(pending)  # what is saved or evaluated has been judged, and its row stands before theirs
                    pending = None
                    state = self.settled(state)
                    self.pause(state, number, stopping=stopping)
                    self.meter.restart()
            self.read(pending)
        return self.settled(state)

    def pauses(self, number: int) -> bool:
        """Whether anything is saved or evaluated after update `number`."""
        pauses = (self.program.config.checkpoint.memory_every, self.program.config.evaluation.every)
        return self.pace.due(number) or any(self.due(every, number) for every in pauses)

    def pause(self, state: TrainState, number: int, *, stopping: bool) -> None:
        """What happens between update `number` and the next. Raises Preempted, the state saved, where asked to stop."""
        self.progress.report(number, "save or evaluate")
        self.progress.enters("save or evaluate")
        config = self.program.config
        samples = number * config.data.global_batch
        if stopping:
            self.saving.last(state, number, samples=samples)
            self.saving.finish()
            self.told.stopped(number)
            raise Preempted(f"stopped after step {number}, state saved; run the same command to go on")
        storage = self.pace.due(number) and number < config.steps
        memory = self.due(config.checkpoint.memory_every, number)
        if storage or memory:
            self.saving.begin(state, number, samples=samples, storage=storage, memory=memory)
        if storage:
            self.pace.saved(number)
        if self.assess is not None and self.due(config.evaluation.every, number):
            self.evaluate(state, number)

    def due(self, every: int, step: int) -> bool:
        """Whether what happens `every` so many steps (0: never) happens after `step`; the last step has its own."""
        return every > 0 and step % every == 0 and step < self.program.config.steps

    def settled(self, state: TrainState) -> TrainState:
        """`state` when what is under way between islands has been used."""
        return self.meetings.settled(state) if self.meetings else state

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """This process's rows of every global batch from update `start` on."""
        return batches(
            self.data.train,
            start=start * self.share.every,
            global_batch=self.share.every,
            rows=self.share.rows,
            prefetch=self.program.config.data.prefetch,
        )

    def read(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Wait for a step's metrics, judge and tell them. Raises MeshwrightError where they are not numbers."""
        if pending is None:
            return
        step, arrays = pending
        metrics = on_host(arrays)  # waits for the device
        self.ledger.applied(step)
        with self.meter.host():
            metrics |= self.meter.lap() | self.saving.row() | self.spent(step)
            if self.meetings:
                metrics |= self.meetings.measured(step)
            elif self.program.traffic:
                metrics["sent_bytes"] = sent(self.program.traffic, step)
            self.told.step(step, metrics)
            if metrics["skipped"] and self.program.config.logging.on_nan == "stop":
                check_finite(step, metrics)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Held-out loss and samples of `state`."""
        began = time.monotonic()
        values, samples = self.assess(state)
        self.told.evaluation(step, values, samples, seconds=time.monotonic() - began)


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raise MeshwrightError where the loss or the gradient of a step is not a number."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise MeshwrightError(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the update was not applied. "
            "Lower optimizer.learning_rate, set optimizer.clip, or logging.on_nan=skip"
        )
