"""The saves of a sitting: begun, journalled, thinned out, and what a failed one means.

saving.begin(state, step, samples=n, storage=True)      returns when the arrays may change
saving.poll()                                           between steps: journals what has become whole
saving.finish()                                         raises where the last save failed: no run ends well without it

A save is a copy of the state, begun at once (`checkpoint/async_copy.py`), that the next step does not wait for; from
the copy a snapshot is written to the host's memory (`snapshot_writer.py`), a checkpoint to storage, or both.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.async_copy import independent
from ..checkpoint.retention import retained
from ..checkpoint.storage import Storage
from ..checkpoint.storage_timeout import StorageHangs
from ..configs.errors import MeshwrightError
from ..configs.sections.training import CheckpointConfig
from ..parallel.multihost import anyone, firsts
from ..parallel.state import TrainState
from .core.event_log import Journal, read_events
from .sdc_check import Vouch
from .snapshot_writer import Snapshots

NOW, LATER, NEVER = "now", "later", "never"
NEWS = 1.0  # seconds between two words while a save is waited for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """A copy that waits for the storage to be free."""

    state: TrainState
    step: int
    samples: int
    stall: float  # seconds that it kept training waiting


@dataclass
class Saving:
    """Saves of one run by `config`. Every process of the run begins the same ones; the first one journals.

    `alive` is told what is waited for, so that waiting for storage is not taken for a hang: that has its own time-out.
    """

    config: CheckpointConfig
    storage: Storage
    journal: Journal
    stamp: Mapping[str, Any]  # what is written into every checkpoint beside the state
    snapshots: Snapshots | None = None  # in the host's memory
    alive: Callable[[str], None] = lambda _: None
    vouch: Vouch = lambda state, step: None  # raises where a state is not to be saved
    failure: MeshwrightError | None = None  # of the newest save; None where it became whole
    failed_at: int = -1  # the step of that save
    waiting: Waiting | None = None  # when_busy: drop-oldest
    began: dict[int, float] = field(default_factory=dict)  # step -> when its save began
    numbers: dict[str, float] = field(default_factory=dict)  # for the next row of metrics

    def begin(self, state: TrainState, step: int, *, samples: int, storage: bool = True, memory: bool = False) -> None:
        """Begin to save `state` after `step` updates, where `config.when_busy` does not say otherwise."""
        began = time.monotonic()
        memory = memory and self.snapshots is not None and self.snapshots.takes(step)
        when = self.when(step) if storage else NEVER
        if when == NEVER and not memory:
            return
        self.vouch(state, step)
        copied = independent(dataclasses.replace(state, frozen={}))  # what never changes is not saved
        stall = time.monotonic() - began
        if memory:
            self.snapshots.begin(copied, step, data={**self.stamp, "samples": samples}, stall=stall)
        if when == NEVER:
            return
        if self.waiting is not None:
            self.journal.record("save-dropped", step=self.waiting.step, reason=f"step {step} is newer")
        self.waiting = Waiting(copied, step, samples, stall)
        if when == NOW:
            self.write()

    def when(self, step: int) -> str:
        """When storage takes a save of `step`: back-pressure, the same on every process."""
        if self.config.when_busy == "wait":
            self.settle()
        if not anyone(self.storage.busy):
            self.note()
            return NOW
        if self.config.when_busy == "drop-oldest":
            return LATER
        if anyone(self.storage.hangs):
            self.note()
            self.failed(StorageHangs(f"step {step} is not saved: the save before it hangs"), step)
        else:
            self.journal.record("save-skipped", step=step, reason="the save before it is still being written")
        return NEVER

    def write(self) -> None:
        """Hand the copy that waits to the storage, which is free."""
        one, self.waiting = self.waiting, None
        began = self.began[one.step] = time.monotonic()
        try:
            self.storage.save(one.state, step=one.step, data={**self.stamp, "samples": one.samples})
        except MeshwrightError as error:
            self.failed(error, one.step)
            return
        stall = one.stall + time.monotonic() - began
        self.numbers["save_stall_seconds"] = stall
        snapshots = self.snapshots.taken() if self.snapshots is not None else {}
        self.journal.record("save", step=one.step, stall_seconds=stall, **snapshots)

    def poll(self) -> None:
        """Note a save that has ended, and begin the one that waits; does not wait."""
        if self.snapshots is not None:
            self.snapshots.poll()
            self.numbers |= self.snapshots.numbers()
        if self.waiting is not None and not anyone(self.storage.busy):
            self.note()
            self.write()
        elif self.storage.ended or self.storage.hangs:
            self.note()

    def row(self) -> dict[str, float]:
        """What saves took since the last row of metrics."""
        numbers, self.numbers = self.numbers, {}
        return numbers

    def settle(self) -> None:
        """Wait for the save under way, on all processes, and note how it ended."""
        step, began = self.storage.pending, time.monotonic()
        while anyone(self.storage.under_way(NEWS)):
            self.alive(f"waits for the save of step {step}, {time.monotonic() - began:.0f} s")
        self.note()

    def note(self) -> None:
        """How the save ended that is not under way any more, or has been for too long."""
        step = self.storage.pending
        if step is None or (self.storage.hangs and step <= self.failed_at):
            return  # nothing new
        try:
            committed = self.storage.wait()
        except MeshwrightError as error:
            self.failed(error, step)
            return
        if committed >= self.failed_at:
            self.failure = None
        spent = {name if name == "bytes" else f"{name}_seconds": one for name, one in vars(self.storage.spent).items()}
        self.numbers |= {f"save_{name}": float(value) for name, value in spent.items()}
        self.journal.record("commit", step=committed, seconds=time.monotonic() - self.began[committed], **spent)
        if self.journal.enabled:
            self.thin_out()

    def last(self, state: TrainState, step: int, *, samples: int) -> None:
        """Save what the sitting ends with, whatever is under way."""
        self.settle()
        if self.waiting is not None:
            self.journal.record("save-dropped", step=self.waiting.step, reason=f"step {step} is the last")
            self.waiting = None
        self.begin(state, step, samples=samples)

    def go_back(self, state: TrainState, step: int, *, samples: int) -> None:
        """A sitting begins with `state` after `step` updates, though the run has saved later ones of its own.

        Nobody is on their time line any more: their checkpoints are set aside, journalled, and their snapshots
        forgotten; `state` is saved in their place.
        """
        shelf = self.storage.shelf
        for later in shelf.steps if self.journal.enabled else ():
            if later > step:
                place = shelf.quarantine(later).relative_to(shelf.directory)
                reason = f"the run went back to {step}, where the others are"
                self.journal.record("quarantine", step=later, level="storage", reason=reason, place=str(place))
        if self.snapshots is not None:
            self.snapshots.forget(beyond=step)
        if firsts(int(step not in shelf.steps)):
            self.begin(state, step, samples=samples)
            self.settle()  # until then a restart would find nothing but what was set aside

    def finish(self) -> None:
        """Wait for the last save, of all processes. Raises MeshwrightError where it failed on any."""
        try:
            self.settle()
            if self.waiting is not None and not anyone(self.storage.busy):
                self.write()
                self.settle()
        except MeshwrightError:
            if self.failure is None:
                raise
        if anyone(self.failure is not None):
            raise self.failure or MeshwrightError("the last save failed on another process, which says why")
        if self.snapshots is not None:
            self.snapshots.clear()  # storage has the state: the memory is the host's again

    def failed(self, error: MeshwrightError, step: int | None) -> None:
        """Journal a save that failed; raise where the policy says stop."""
        self.failure, self.failed_at = error, -1 if step is None else step
        logger.warning("%s", error)
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
        try:
            self.storage.keep_only(kept)
        except OSError as error:  # the next commit tries again
            logger.warning("old checkpoints cannot be deleted: %s", error)


def scores(journal: Journal) -> dict[int, float]:
    """Step -> held-out loss, as evaluated in any sitting."""
    return {
        event["step"]: float(event["held_out_loss"])
        for event in read_events(journal.path.parent)
        if event.get("event") == "evaluation" and "held_out_loss" in event
    }
