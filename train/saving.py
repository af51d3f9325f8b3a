"""The saves of a sitting: begun, journalled, thinned out, and what a failed one means.

saving.begin(state, step)      returns when the arrays may change
saving.poll()                  between steps: journals what has become whole, deletes what need not stay
saving.finish()                raises where the last save failed: no run ends well without its state
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.memory import Memory
from ..checkpoint.retention import retained
from ..checkpoint.storage import Storage
from ..configs.errors import MeshwrightError
from ..configs.training import CheckpointConfig
from ..parallel.state import TrainState
from .report.journal import Journal, read_events


@dataclass
class Saving:
    """Saves of one run by `config`. Every process of the run begins the same ones; the first one journals."""

    config: CheckpointConfig
    storage: Storage
    journal: Journal
    stamp: Mapping[str, Any]  # what is written into every checkpoint beside the state
    memory: Memory | None = None  # snapshots in the host's memory
    failure: MeshwrightError | None = None  # of the newest save; None where it became whole
    snapshots: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes) since the last checkpoint
    began: dict[int, float] = field(default_factory=dict)  # step -> when its save began

    def begin(self, state: TrainState, step: int, *, samples: int) -> None:
        """Begin to save `state` after `step` updates, once the save before it has ended."""
        self.settle()
        began = self.began[step] = time.monotonic()
        try:
            self.storage.save(state, step=step, data={**self.stamp, "samples": samples})
        except MeshwrightError as error:
            self.failed(error, step)
            return
        self.journal.record(
            "save",
            step=step,
            stall_seconds=time.monotonic() - began,
            snapshots=len(self.snapshots),
            snapshot_seconds=sum(seconds for seconds, _ in self.snapshots),
            snapshot_bytes=max((written for _, written in self.snapshots), default=0),
        )
        self.snapshots.clear()

    def snapshot(self, state: TrainState, step: int, *, samples: int) -> None:
        """Copy `state` to the host's memory; the next checkpoint's line in the journal says what these took."""
        if self.memory is None:
            return
        began = time.monotonic()
        try:
            written = self.memory.save(state, step=step, data={**self.stamp, "samples": samples})
        except OSError as error:
            self.journal.record("save-failed", step=step, level="memory", message=str(error)[:500])
            self.memory = None  # storage goes on; a full memory does not empty itself
            return
        self.snapshots.append((time.monotonic() - began, written))

    def poll(self) -> None:
        """Note a save that has ended; does not wait."""
        if self.storage.ended:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way and note how it ended."""
        step = self.storage.pending
        try:
            committed = self.storage.wait()
        except MeshwrightError as error:
            self.failed(error, step)
            return
        if committed is None:
            return
        self.failure = None
        self.journal.record(
            "commit",
            step=committed,
            seconds=time.monotonic() - self.began[committed],
            fingerprint_seconds=self.storage.fingerprint_seconds,
        )
        if self.journal.enabled:
            self.thin_out()

    def finish(self) -> None:
        """Wait for the last save. Raises MeshwrightError where it failed."""
        self.settle()
        if self.failure is not None:
            raise self.failure
        if self.memory is not None:
            self.memory.clear()  # storage has the state: the memory is the host's again

    def failed(self, error: MeshwrightError, step: int | None) -> None:
        """Journal a save that failed; raise where the policy says stop."""
        self.failure = error
        self.journal.record("save-failed", step=step, message=str(error)[:500])
        if self.config.on_failure == "stop":
            raise error

    def thin_out(self) -> None:
        """Delete the checkpoints that need not stay."""
        steps = self.storage.steps
        kept = retained(
            steps,
            newest=self.config.keep,
            every=self.config.keep_every,
            best=self.config.keep_best,
            scores=scores(self.journal) if self.config.keep_best else None,
        )
        self.storage.keep_only(kept)


def scores(journal: Journal) -> dict[int, float]:
    """Step -> held-out loss, as evaluated in any sitting."""
    return {
        event["step"]: float(event["held_out_loss"])
        for event in read_events(journal.path.parent)
        if event.get("event") == "evaluation" and "held_out_loss" in event
    }
