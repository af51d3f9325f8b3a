"""The training loop: read a batch, make a step, synchronize; between two steps save, evaluate or stop.

    state = Loop(...).run(state, start)

The loop reads the metrics of a step while the next one runs, so the device never waits for the host. Steps are counted
from 1; "after step 0" is before the first one.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ..configs.errors import MeshwrightError, Preemption
from ..parallel.outer.traffic import bytes_sent
from ..parallel.state import TrainState
from .checkpoint_schedule import CheckpointSchedule
from .checkpointer import Checkpointer
from .core.heartbeat import ProgressReporter
from .core.sample_log import SampleLog
from .data.assemble import Data
from .data.batches import batches
from .engine.host_data import ProcessShard, make_global_arrays
from .engine.program import Program
from .engine.replicas import Synchronize, metrics_to_host
from .engine.step import Step
from .infer.evaluator import Evaluator
from .islands.sync import IslandSync, StateReplaced
from .launch.straggler_detection import WAIT
from .metrics.metrics_logger import MetricsLogger
from .metrics.throughput import Meter
from .preemption import StopRequest
from .profiling import StepProfiler


@dataclass
class Loop:
    """The training loop of one session, with everything it reads from and reports to."""

    program: Program
    data: Data
    data_from: Callable[[int], Data]  # step -> `data`, annotated (reference log p, teacher tokens) from that step on
    shard: ProcessShard
    directory: Path
    train_step: Step
    synchronize: Synchronize
    island_sync: IslandSync | None  # synchronization with other islands; then it is `synchronize`, too
    evaluator: Evaluator | None  # None: the data hold nothing out
    checkpointer: Checkpointer
    checkpoint_schedule: CheckpointSchedule
    sample_log: SampleLog
    stop_request: StopRequest
    progress: ProgressReporter
    meter: Meter
    metrics_logger: MetricsLogger
    privacy_metrics: Callable[[int], dict[str, float]]  # step -> epsilon spent so far; empty without privacy

    def run(self, state: TrainState, start: int) -> TrainState:
        """Train from step `start` to `config.steps`, save and evaluate; return the last state.

        Raises Preemption, after the state was saved, if the process is asked to stop.
        """
        config = self.program.config
        if self.evaluator is not None and config.evaluation.start and start == 0:
            self.evaluate(state, 0)
            self.meter.restart()
        if self.island_sync and start < config.steps:
            state, agreed_start = self.island_sync.begin(state, start)
            if agreed_start < start:  # the other islands are behind
                samples = agreed_start * config.data.global_batch
                self.checkpointer.rewind(state, agreed_start, samples=samples)
                self.data = self.data_from(agreed_start)
            start = agreed_start
        state = self.run_to_end(state, start)
        self.progress.report(config.steps, "finish")
        if config.steps > start or config.steps not in self.checkpointer.storage.steps:
            self.checkpointer.save_final(state, config.steps, samples=config.steps * config.data.global_batch)
        if self.evaluator is not None:
            self.evaluate(state, config.steps)
        if self.island_sync:
            self.island_sync.finish(state, config.steps)
        return state

    def run_to_end(self, state: TrainState, start: int) -> TrainState:
        """Run steps from `start` to the last; start over wherever this island takes the state of another one."""
        while True:
            try:
                return self.run_steps(state, start)
            except StateReplaced as moved:
                state, start = moved.state, moved.step

    def run_steps(self, state: TrainState, start: int) -> TrainState:
        """Run the steps after `start` up to the last.

        Raises StateReplaced if this island takes the state of another one.
        """
        config = self.program.config
        pending = None  # (step, metrics on device) that nobody has read yet
        self.sample_log.record_start(start)
        self.checkpoint_schedule.restart(start)
        profiler = StepProfiler(config.logging.profile, self.directory)
        with closing(profiler), closing(self.batches(start)) as feed:
            for step in range(start + 1, config.steps + 1):
                with profiler.step(step):
                    self.progress.set_activity("input")
                    with self.meter.host():
                        rows = next(feed)
                        self.sample_log.record_rows(step, rows, first=self.shard.first_sample(step - 1))
                        batch = make_global_arrays(rows, config, self.program.mesh)
                    self.progress.set_activity(WAIT)
                    state, metrics = self.train_step(state, batch)
                    self.log_step(pending)
                    pending = (step, metrics)
                    try:
                        state = self.synchronize(state, step)  # if it waits for others, that counts as time of `step`
                    except StateReplaced:  # the steps up to here were made, even if their result is dropped
                        self.log_step(pending)
                        raise
                self.progress.report(step - 1)  # its metrics have been read, so it is done
                self.progress.set_activity("host")
                self.checkpointer.poll()
                stopping = self.stop_request.should_stop(step) and step < config.steps
                if stopping or self.needs_pause(step):
                    self.progress.set_activity(WAIT)
                    # Read the metrics first: an unhealthy step is not saved, and rows of metrics stay in order.
                    self.log_step(pending)
                    pending = None
                    state = self.drain(state)
                    self.save_and_evaluate(state, step, stopping=stopping)
                    self.meter.restart()
            self.log_step(pending)
        return self.drain(state)

    def needs_pause(self, step: int) -> bool:
        """Whether the run saves or evaluates after `step`."""
        intervals = (self.program.config.checkpoint.memory_every, self.program.config.evaluation.every)
        saves = self.checkpoint_schedule.should_save(step)
        return saves or any(self.is_interval_end(interval, step) for interval in intervals)

    def save_and_evaluate(self, state: TrainState, step: int, *, stopping: bool) -> None:
        """Save and evaluate after `step`, as far as they are due.

        If `stopping`, save the state and raise Preemption.
        """
        self.progress.report(step, "save or evaluate")
        self.progress.set_activity("save or evaluate")
        config = self.program.config
        samples = step * config.data.global_batch
        if stopping:
            self.checkpointer.save_final(state, step, samples=samples)
            self.checkpointer.finish()
            self.metrics_logger.log_preemption(step)
            raise Preemption(f"stopped after step {step}, state saved; run the same command to go on")
        storage = self.checkpoint_schedule.should_save(step) and step < config.steps
        memory = self.is_interval_end(config.checkpoint.memory_every, step)
        if storage or memory:
            self.checkpointer.start_save(state, step, samples=samples, storage=storage, memory=memory)
        if storage:
            self.checkpoint_schedule.restart(step)
        if self.evaluator is not None and self.is_interval_end(config.evaluation.every, step):
            self.evaluate(state, step)

    def is_interval_end(self, interval: int, step: int) -> bool:
        """Whether `step` is a multiple of `interval` (0: never). The last step is left out: `run` handles it."""
        return interval > 0 and step % interval == 0 and step < self.program.config.steps

    def drain(self, state: TrainState) -> TrainState:
        """Finish every exchange with other islands that is under way; return the state with its result."""
        return self.island_sync.drain(state) if self.island_sync else state

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield this process's rows of every global batch after step `start`."""
        return batches(
            self.data.train,
            start=start * self.shard.run_batch,
            global_batch=self.shard.run_batch,
            rows=self.shard.rows,
            prefetch=self.program.config.data.prefetch,
        )

    def log_step(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Wait for the metrics of a step and publish them; None: nothing to do.

        Raises MeshwrightError if loss or gradient norm is not finite and `logging.on_nan` is "stop".
        """
        if pending is None:
            return
        step, arrays = pending
        metrics = metrics_to_host(arrays)  # waits for the device
        self.sample_log.record_update(step)
        with self.meter.host():
            metrics |= self.meter.lap() | self.checkpointer.take_metrics() | self.privacy_metrics(step)
            if self.island_sync:
                metrics |= self.island_sync.traffic_metrics(step)
            elif self.program.traffic:
                metrics["sent_bytes"] = bytes_sent(self.program.traffic, step)
            self.metrics_logger.log_step(step, metrics)
            if metrics["skipped"] and self.program.config.logging.on_nan == "stop":
                check_finite(step, metrics)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Compute and publish the held-out metrics and samples of `state`."""
        began = time.monotonic()
        values, samples = self.evaluator(state)
        self.metrics_logger.log_evaluation(step, values, samples, seconds=time.monotonic() - began)


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raise MeshwrightError if the loss or the gradient norm of a step is not finite."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise MeshwrightError(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the update was not applied. "
            "Lower optimizer.learning_rate, set optimizer.clip, or logging.on_nan=skip"
        )
