"""The checkpointer starts the saves of a session, records how they end, and deletes old checkpoints.

    checkpointer.start_save(state, step, samples=n)     returns as soon as the arrays may change
    checkpointer.poll()                                 between steps: records the saves that have ended
    checkpointer.finish()                               raises if the last save failed: such a run does not end well

A save starts with a copy of the state (`checkpoint/async_copy.py`), which the next step does not wait for. The copy is
written to the host's memory as a snapshot (`snapshot_writer.py`), to storage as a checkpoint, or both.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.async_copy import donation_safe_copy
from ..checkpoint.retention import select_retained
from ..checkpoint.storage import Storage
from ..checkpoint.storage_timeout import StorageTimeout
from ..configs.errors import MeshwrightError
from ..configs.sections.training import CheckpointConfig
from ..parallel.multihost import any_process, broadcast_int
from ..parallel.state import TrainState
from .core.event_log import EventLog, read_events
from .sdc_check import StateCheck
from .snapshot_writer import SnapshotWriter

NOW, LATER, NEVER = "now", "later", "never"
REPORT_SECONDS = 1.0  # between two progress reports while the run waits for a save

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueuedSave:
    """A copy of the state that waits until the storage is free."""

    state: TrainState
    step: int
    samples: int
    stall: float  # seconds that training waited for the copy


@dataclass
class Checkpointer:
    """Saves the state as `config` asks. Every process of the run starts the same saves; the first one records events.

    `report_waiting` publishes what the run waits for, so that the supervisor does not take a slow storage for a hang:
    the storage has a time-out of its own.
    """

    config: CheckpointConfig
    storage: Storage
    event_log: EventLog
    metadata: Mapping[str, Any]  # written into every checkpoint beside the state
    snapshots: SnapshotWriter | None = None  # None: no snapshots in the host's memory
    report_waiting: Callable[[str], None] = lambda _: None
    check_state: StateCheck = lambda state, step: None  # raises for a state that must not be saved
    failure: MeshwrightError | None = None  # of the newest save; None if it is complete
    failed_step: int = -1  # the step of that save
    queued: QueuedSave | None = None  # only with when_busy: drop-oldest
    start_times: dict[int, float] = field(default_factory=dict)  # step -> monotonic seconds when its save started
    metrics: dict[str, float] = field(default_factory=dict)  # for the next row of metrics

    def start_save(
        self, state: TrainState, step: int, *, samples: int, storage: bool = True, memory: bool = False
    ) -> None:
        """Start to save `state` after `step` updates, unless `config.when_busy` drops this save. Collective."""
        began = time.monotonic()
        memory = memory and self.snapshots is not None and self.snapshots.accepts(step)
        when = self.decide_when_busy(step) if storage else NEVER
        if when == NEVER and not memory:
            return
        self.check_state(state, step)
        copy = donation_safe_copy(dataclasses.replace(state, frozen={}))  # frozen weights never change
        stall = time.monotonic() - began
        if memory:
            self.snapshots.start_snapshot(copy, step, data={**self.metadata, "samples": samples}, stall=stall)
        if when == NEVER:
            return
        if self.queued is not None:
            self.event_log.record("save-dropped", step=self.queued.step, reason=f"step {step} is newer")
        self.queued = QueuedSave(copy, step, samples, stall)
        if when == NOW:
            self.write_queued()

    def decide_when_busy(self, step: int) -> str:
        """Return NOW, LATER or NEVER for a save of `step` to a storage that may be busy. Collective."""
        if self.config.when_busy == "wait":
            self.wait()
        if not any_process(self.storage.saving):
            self.record_result()
            return NOW
        if self.config.when_busy == "drop-oldest":
            return LATER
        if any_process(self.storage.timed_out):
            self.record_result()
            self.record_failure(StorageTimeout(f"step {step} is not saved: the save before it hangs"), step)
        else:
            self.event_log.record("save-skipped", step=step, reason="the save before it is still being written")
        return NEVER

    def write_queued(self) -> None:
        """Start to write the queued copy; the storage must be free."""
        save, self.queued = self.queued, None
        began = self.start_times[save.step] = time.monotonic()
        try:
            self.storage.save(save.state, step=save.step, data={**self.metadata, "samples": save.samples})
        except MeshwrightError as error:
            self.record_failure(error, save.step)
            return
        stall = save.stall + time.monotonic() - began
        self.metrics["save_stall_seconds"] = stall
        snapshot_totals = self.snapshots.take_totals() if self.snapshots is not None else {}
        self.event_log.record("save", step=save.step, stall_seconds=stall, **snapshot_totals)

    def poll(self) -> None:
        """Record a save that has ended, and start the queued one. Does not wait."""
        if self.snapshots is not None:
            self.snapshots.poll()
            self.metrics |= self.snapshots.take_metrics()
        if self.queued is not None and not any_process(self.storage.saving):
            self.record_result()
            self.write_queued()
        elif self.storage.finished or self.storage.timed_out:
            self.record_result()

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of saves since the last call: seconds and bytes by metric name."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def wait(self) -> None:
        """Wait until no process is saving, and record how the save ended. Collective."""
        step, began = self.storage.pending_step, time.monotonic()
        while any_process(self.storage.still_saving_after(REPORT_SECONDS)):
            self.report_waiting(f"waits for the save of step {step}, {time.monotonic() - began:.0f} s")
        self.record_result()

    def record_result(self) -> None:
        """Record how the pending save ended: committed, failed, or timed out."""
        step = self.storage.pending_step
        if step is None or (self.storage.timed_out and step <= self.failed_step):
            return  # its result is recorded already
        try:
            committed = self.storage.wait()
        except MeshwrightError as error:
            self.record_failure(error, step)
            return
        if committed >= self.failed_step:
            self.failure = None
        stats = {
            name if name == "bytes" else f"{name}_seconds": value
            for name, value in vars(self.storage.save_stats).items()
        }
        self.metrics |= {f"save_{name}": float(value) for name, value in stats.items()}
        self.event_log.record("commit", step=committed, seconds=time.monotonic() - self.start_times[committed], **stats)
        if self.event_log.enabled:
            self.apply_retention()

    def save_final(self, state: TrainState, step: int, *, samples: int) -> None:
        """Start to save the last state of the session, after the save under way has ended."""
        self.wait()
        if self.queued is not None:
            self.event_log.record("save-dropped", step=self.queued.step, reason=f"step {step} is the last")
            self.queued = None
        self.start_save(state, step, samples=samples)

    def rewind(self, state: TrainState, step: int, *, samples: int) -> None:
        """Start this session from `state` after `step` updates, although the run has saved later steps. Collective.

        The later steps no longer belong to the run: their checkpoints are quarantined, their snapshots deleted, and
        `state` is saved instead.
        """
        checkpoints = self.storage.checkpoints
        for later in checkpoints.steps if self.event_log.enabled else ():
            if later > step:
                place = checkpoints.quarantine(later).relative_to(checkpoints.directory)
                reason = f"the run went back to {step}, where the others are"
                self.event_log.record("quarantine", step=later, level="storage", reason=reason, place=str(place))
        if self.snapshots is not None:
            self.snapshots.delete_after(step)
        if broadcast_int(int(step not in checkpoints.steps)):
            self.start_save(state, step, samples=samples)
            self.wait()  # until it is complete, a restart would find quarantined checkpoints only

    def finish(self) -> None:
        """Wait for the last save of all processes. Raises MeshwrightError if it failed on any of them."""
        try:
            self.wait()
            if self.queued is not None and not any_process(self.storage.saving):
                self.write_queued()
                self.wait()
        except MeshwrightError:
            if self.failure is None:
                raise
        if any_process(self.failure is not None):
            raise self.failure or MeshwrightError("the last save failed on another process; its log says why")
        if self.snapshots is not None:
            self.snapshots.clear()  # the state is in storage, so the host gets its memory back

    def record_failure(self, error: MeshwrightError, step: int | None) -> None:
        """Record a failed save; raise `error` if `config.on_failure` is "stop"."""
        self.failure, self.failed_step = error, -1 if step is None else step
        logger.warning("%s", error)
        self.event_log.record("save-failed", step=step, message=str(error)[:500])
        if self.config.on_failure == "stop":
            raise error

    def apply_retention(self) -> None:
        """Delete the checkpoints that `config` does not keep."""
        kept = select_retained(
            self.storage.steps,
            keep_newest=self.config.keep,
            keep_every=self.config.keep_every,
            keep_best=self.config.keep_best,
            scores=held_out_losses(self.event_log) if self.config.keep_best else None,
        )
        try:
            self.storage.delete_except(kept)
        except OSError as error:  # the next commit tries again
            logger.warning("old checkpoints cannot be deleted: %s", error)


def held_out_losses(event_log: EventLog) -> dict[int, float]:
    """Return step -> held-out loss, over all sessions of the run."""
    return {
        event["step"]: float(event["held_out_loss"])
        for event in read_events(event_log.path.parent)
        if event.get("event") == "evaluation" and "held_out_loss" in event
    }
