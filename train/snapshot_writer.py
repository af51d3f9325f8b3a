"""Snapshots of a sitting in the host's memory, written beside training from a copy of the state.

A snapshot is *safe* once it is whole and, with `checkpoint.parity`, protected by every group of hosts. The newest safe
one of all processes is never overwritten: whatever dies, one step is whole everywhere. Two slots hold it and the next.

    snapshots.takes(step)       back-pressure: waits, or says no, where the one before is not safe yet
    snapshots.begin(copy, ...)  returns at once
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..checkpoint.memory_store import Memory
from ..configs.sections.training import CheckpointConfig
from ..parallel.multihost import everyones
from ..parallel.state import TrainState
from .core.event_log import Journal

PATIENCE = 60.0  # seconds to wait for keepers to protect a snapshot; after that training goes on without
GIVEN_UP = -2  # what a process that could not write says to the others
LOOK = 0.005


class Snapshots:
    """Snapshots to `memory` by `config`, every process the same ones. `allowed` raises where it may not write."""

    def __init__(
        self, config: CheckpointConfig, memory: Memory, journal: Journal, allowed: Callable[[], None] = lambda: None
    ) -> None:
        self._config, self._memory, self._journal, self._allowed = config, memory, journal, allowed
        self._worker = ThreadPoolExecutor(1, "snapshot")
        self._jobs: list[tuple[int, Future]] = []  # under way, and waiting
        self._offered = self._written = self._keep = -1
        self._unprotected: int | None = None  # the step that keepers failed to protect in time
        self._failed = self._over = False  # this process could not write; so no process does any more
        self._waited = 0.0  # seconds that the next snapshot kept training waiting so far
        self._stalls: list[float] = []
        self._copies: list[float] = []
        self._bytes, self._row = 0, dict[str, float]()

    def reserve(self, state: TrainState) -> None:
        """Have the memory of both slots touched, beside whatever comes next."""
        self._jobs.append((-1, self._worker.submit(self._memory.reserve, state)))

    @property
    def safe(self) -> int:
        """The newest step that may be relied on, as far as this process knows; -1: none."""
        return self._written if self._config.parity == "none" else self._memory.protected.step

    def takes(self, step: int) -> bool:
        """Whether a snapshot of `step` is to be taken, the same on every process."""
        if self._over:
            return False
        self.poll()
        began = time.monotonic()
        if self._config.when_busy == "wait":
            self._wait()
        known = everyones(GIVEN_UP if self._failed else self.safe)
        if GIVEN_UP in known:
            self._over = True
            if not self._failed:
                self._fail(f"process {known.index(GIVEN_UP)} could not write its snapshot")
            return False
        self._keep = min(known)
        if self._config.when_busy == "skip" and self._keep < self._offered:
            self._journal.record("save-skipped", step=step, level="memory", reason=f"{self._offered} is not safe yet")
            return False
        self._waited = time.monotonic() - began
        return True

    def _wait(self) -> None:
        """Until the snapshot before is safe. Training does not stand still for keepers that do not protect."""
        while self._written < self._offered and not self._failed:
            time.sleep(LOOK)
            self.poll()
        if self._config.parity == "none" or self._failed or self._offered < 0:
            return
        patience = PATIENCE if self._unprotected is None else 0.0
        deadline = time.monotonic() + patience
        while self.safe < self._offered and time.monotonic() < deadline:
            time.sleep(LOOK)
        if self.safe >= self._offered:
            self._unprotected = None
        elif self._unprotected is None:
            self._unprotected = self._offered
            reason = f"no parity of step {self._offered} after {PATIENCE:.0f} s; step {self.safe} stays protected"
            self._journal.record("unprotected", step=self._offered, reason=reason)

    def begin(self, copy: TrainState, step: int, *, data: Mapping[str, Any], stall: float) -> None:
        """Write `copy` to a slot, beside training. `stall`: seconds that copying kept training waiting."""
        self._allowed()
        for number, (dropped, job) in enumerate(self._jobs):
            if dropped >= 0 and job.cancel():
                del self._jobs[number]
                self._journal.record("save-dropped", step=dropped, level="memory", reason=f"step {step} is newer")
        self._offered = step
        self._stalls.append(stall + self._waited)
        self._row["snapshot_stall_seconds"] = stall + self._waited
        job = self._worker.submit(self._write, copy, step, dict(data), self._keep)
        self._jobs.append((step, job))

    def _write(self, copy: TrainState, step: int, data: dict[str, Any], keep: int) -> tuple[int, float]:
        began = time.monotonic()
        return self._memory.save(copy, step=step, data=data, keep=keep), time.monotonic() - began

    def poll(self) -> None:
        """Note what has ended; does not wait."""
        ended = [(step, job) for step, job in self._jobs if job.done()]
        self._jobs = [(step, job) for step, job in self._jobs if not job.done()]
        for step, job in ended:
            try:
                result = job.result()
            except OSError as error:  # a full memory does not empty itself; storage goes on
                self._failed = True
                self._fail(str(error))
                continue
            if step >= 0:
                self._written, (self._bytes, took) = step, result
                self._copies.append(took)
                self._row |= {"snapshot_copy_seconds": took, "snapshot_bytes": float(self._bytes)}

    def numbers(self) -> dict[str, float]:
        """For a row of metrics."""
        row, self._row = self._row, {}
        if self._config.parity != "none" and (protected := self._memory.protected).step >= 0:
            row |= {"protect_seconds": protected.seconds, "parity_bytes": float(protected.bytes)}
        return row

    def taken(self) -> dict[str, Any]:
        """What the snapshots since the last checkpoint took, for its line in the journal."""
        found = {
            "snapshots": len(self._stalls),
            "snapshot_seconds": sum(self._stalls),
            "snapshot_copy_seconds": sum(self._copies),
            "snapshot_bytes": self._bytes,
        }
        self._stalls.clear(), self._copies.clear()
        return found

    def _fail(self, why: str) -> None:
        self._journal.record("save-failed", step=self._offered, level="memory", message=why[:500])

    def forget(self, *, beyond: int) -> None:
        """Delete the snapshots of later steps than `beyond`, once what is under way has ended."""
        self._worker.submit(self._memory.forget, beyond=beyond).result()

    def clear(self) -> None:
        """Delete the snapshots: storage has the state."""
        self.close()
        self._memory.clear()

    def close(self) -> None:
        """Let what is under way end."""
        self._worker.shutdown()
