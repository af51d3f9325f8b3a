"""The snapshot writer writes copies of the state into the host's memory while training goes on.

A snapshot is *safe* once it is complete and, with `checkpoint.parity`, protected by every parity group. The newest step
that is safe on all processes is never overwritten, so whatever fails, one step is complete everywhere. Two slots hold
this step and the next one.

    snapshots.accepts(step)               back-pressure: waits, or refuses, while the snapshot before is not safe
    snapshots.start_snapshot(copy, ...)   returns at once
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..checkpoint.memory_store import MemoryStore
from ..configs.sections.training import CheckpointConfig
from ..parallel.multihost import all_gather_int
from ..parallel.state import TrainState
from .core.event_log import EventLog

PROTECTION_TIMEOUT = 60.0  # seconds to wait until snapshot agents have protected a snapshot; then training goes on
WRITE_FAILED = -2  # gathered in place of a step from a process that could not write
POLL_SECONDS = 0.005


class SnapshotWriter:
    """Writes snapshots to `memory` as `config` asks; all processes write the same steps.

    `check_allowed` raises if this process may not write any more.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        memory: MemoryStore,
        event_log: EventLog,
        check_allowed: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._memory, self._event_log, self._check_allowed = config, memory, event_log, check_allowed
        self._worker = ThreadPoolExecutor(1, "snapshot")
        self._jobs: list[tuple[int, Future]] = []  # (step, write): running and queued
        self._started_step = self._written_step = -1
        self._keep_step = -1  # the newest step that is safe on all processes
        self._unprotected_step: int | None = None  # that snapshot agents did not protect in time
        self._failed = False  # this process could not write
        self._stopped = False  # some process could not write, so no process writes any more
        self._waited = 0.0  # seconds that training has waited for the next snapshot so far
        self._stalls: list[float] = []  # seconds, of each snapshot since `take_totals`
        self._write_seconds: list[float] = []  # of each snapshot since `take_totals`
        self._bytes, self._metrics = 0, dict[str, float]()

    def reserve(self, state: TrainState) -> None:
        """Touch the memory of both slots in the background, so that the first snapshots find it allocated."""
        self._jobs.append((-1, self._worker.submit(self._memory.reserve, state)))

    @property
    def safe_step(self) -> int:
        """The newest safe step, as far as this process knows; -1: none."""
        return self._written_step if self._config.parity == "none" else self._memory.protected.step

    def accepts(self, step: int) -> bool:
        """Whether to take a snapshot of `step`. Collective; waits if `config.when_busy` says so."""
        if self._stopped:
            return False
        self.poll()
        began = time.monotonic()
        if self._config.when_busy == "wait":
            self._wait()
        safe_steps = all_gather_int(WRITE_FAILED if self._failed else self.safe_step)
        if WRITE_FAILED in safe_steps:
            self._stopped = True
            if not self._failed:
                self._record_failure(f"process {safe_steps.index(WRITE_FAILED)} could not write its snapshot")
            return False
        self._keep_step = min(safe_steps)
        if self._config.when_busy == "skip" and self._keep_step < self._started_step:
            reason = f"step {self._started_step} is not safe yet"
            self._event_log.record("save-skipped", step=step, level="memory", reason=reason)
            return False
        self._waited = time.monotonic() - began
        return True

    def _wait(self) -> None:
        """Wait until the snapshot before is safe. After a time-out training no longer waits for its protection."""
        step = self._started_step
        while self._written_step < step and not self._failed:
            time.sleep(POLL_SECONDS)
            self.poll()
        if self._config.parity == "none" or self._failed or step < 0:
            return
        deadline = time.monotonic() + (PROTECTION_TIMEOUT if self._unprotected_step is None else 0.0)
        while self.safe_step < step and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if self.safe_step >= step:
            self._unprotected_step = None
        elif self._unprotected_step is None:
            self._unprotected_step = step
            reason = f"no parity of step {step} after {PROTECTION_TIMEOUT:.0f} s; step {self.safe_step} stays protected"
            self._event_log.record("unprotected", step=step, reason=reason)

    def start_snapshot(self, copy: TrainState, step: int, *, data: Mapping[str, Any], stall: float) -> None:
        """Write `copy` to a slot in the background. `stall`: seconds that training waited for the copy."""
        self._check_allowed()
        for number, (queued_step, job) in enumerate(self._jobs):
            if queued_step >= 0 and job.cancel():
                del self._jobs[number]
                self._event_log.record("save-dropped", step=queued_step, level="memory", reason=f"step {step} is newer")
        self._started_step = step
        self._stalls.append(stall + self._waited)
        self._metrics["snapshot_stall_seconds"] = stall + self._waited
        self._jobs.append((step, self._worker.submit(self._write, copy, step, dict(data), self._keep_step)))

    def _write(self, copy: TrainState, step: int, data: dict[str, Any], keep_step: int) -> tuple[int, float]:
        """Return (bytes, seconds)."""
        began = time.monotonic()
        return self._memory.save(copy, step=step, data=data, keep_step=keep_step), time.monotonic() - began

    def poll(self) -> None:
        """Record the writes that have ended. Does not wait."""
        ended = [(step, job) for step, job in self._jobs if job.done()]
        self._jobs = [(step, job) for step, job in self._jobs if not job.done()]
        for step, job in ended:
            try:
                result = job.result()
            except OSError as error:  # a full memory stays full; saves to storage go on
                self._failed = True
                self._record_failure(str(error))
                continue
            if step >= 0:
                self._written_step, (self._bytes, seconds) = step, result
                self._write_seconds.append(seconds)
                self._metrics |= {"snapshot_copy_seconds": seconds, "snapshot_bytes": float(self._bytes)}

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of snapshots since the last call: seconds and bytes by metric name."""
        metrics, self._metrics = self._metrics, {}
        if self._config.parity != "none" and (protected := self._memory.protected).step >= 0:
            metrics |= {"protect_seconds": protected.seconds, "parity_bytes": float(protected.bytes)}
        return metrics

    def take_totals(self) -> dict[str, Any]:
        """Return count, seconds and bytes of the snapshots since the last call, as fields of a "save" event."""
        totals = {
            "snapshots": len(self._stalls),
            "snapshot_seconds": sum(self._stalls),
            "snapshot_copy_seconds": sum(self._write_seconds),
            "snapshot_bytes": self._bytes,
        }
        self._stalls.clear(), self._write_seconds.clear()
        return totals

    def _record_failure(self, reason: str) -> None:
        self._event_log.record("save-failed", step=self._started_step, level="memory", message=reason[:500])

    def delete_after(self, step: int) -> None:
        """Wait for the writes under way, and delete the snapshots of later steps than `step`."""
        self._worker.submit(self._memory.delete_after, beyond=step).result()

    def clear(self) -> None:
        """Wait for the writes under way, and delete all snapshots."""
        self.close()
        self._memory.clear()

    def close(self) -> None:
        """Wait for the writes under way."""
        self._worker.shutdown()
