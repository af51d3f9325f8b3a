"""Progress reports of a process to its supervisor: the steps it has done, and what it does next. JAX-free.

Being alive proves nothing; making steps does. A thread sends the newest report, and heartbeats between steps, so that
a process that was stopped (SIGSTOP) can be told from one that waits. Without a supervisor nothing is sent. The reports
also count the seconds spent on each activity: the time that a process works between two waits shows which process the
others wait for (`train/launch/straggler_detection.py`).
"""

import threading
import time
from typing import Any

from ...configs.errors import MeshwrightError
from .fence import Fence
from .process_env import ProcessInfo
from .rendezvous import Client, NotAMember

REPORT_SECONDS = 0.1  # between two reports: short steps are not reported one by one
HEARTBEAT_SECONDS = 0.5  # between two reports without news
CORRUPT_PHASE = "errs"  # the last phase of a process whose device computes wrongly; it ends
SUPERVISOR_TIMEOUT = 60.0  # seconds without an answer after which the supervisor counts as gone


def member_name(world: ProcessInfo) -> str:
    """Return the member name of a process: unique over all epochs of a run."""
    return f"{world.epoch}/{world.process}"


class ProgressReporter:
    """Sends the reports of one process. Every report checks `fence`, so a process of an older epoch ends here."""

    def __init__(self, world: ProcessInfo, fence: Fence) -> None:
        self._fence, self._name, self._address = fence, member_name(world), world.rendezvous
        self._progress: tuple[int, str] = (0, "start")  # (updates done, phase)
        self._seconds: dict[str, float] = {}  # by activity
        self._activity, self._since = "start", time.monotonic()
        self._closed = threading.Event()
        self._supervisor_error: str | None = None  # set once the supervisor counts as gone
        if self._address:
            threading.Thread(target=self._send_reports, name="progress", daemon=True).start()

    def report(self, step: int, phase: str = "step") -> None:
        """Report that `step` updates are done and that `phase` comes next.

        Raises FencedOutError if the run belongs to a later epoch. Raises MeshwrightError if the supervisor has not
        answered for a minute: a new one would start this run again without knowing of this process.
        """
        self._fence.check()
        if self._supervisor_error is not None:
            raise MeshwrightError(
                f"the launcher has not answered for {SUPERVISOR_TIMEOUT:.0f} s ({self._supervisor_error}); "
                "this process ends, because a new launcher would not know of it"
            )
        self._progress = (step, phase)

    def report_waiting(self, phase: str) -> None:
        """Report a slow `phase` that makes no step, so that the supervisor does not take it for a hang."""
        self.report(self._progress[0], phase)

    def set_activity(self, activity: str) -> None:
        """Count the seconds from now on as `activity`; `straggler_detection.WAIT`: waiting for others at the step."""
        self._seconds = self.timers()["spent"]
        self._activity, self._since = activity, time.monotonic()

    def timers(self) -> dict[str, Any]:
        """Return the current activity ("doing") and the seconds of each activity so far ("spent")."""
        seconds, activity, since = self._seconds, self._activity, self._since
        current = seconds.get(activity, 0.0) + time.monotonic() - since
        return {"doing": activity, "spent": seconds | {activity: current}}

    def close(self) -> None:
        """End the reports."""
        self._closed.set()

    def _send_reports(self) -> None:
        last_sent, beats, sent_at = None, 0, 0.0
        answered_at = time.monotonic()
        with Client(self._address, self._name, ttl=1e9) as client:
            while not self._closed.wait(REPORT_SECONDS):
                now, progress = time.monotonic(), self._progress
                if progress == last_sent and now - sent_at < HEARTBEAT_SECONDS:
                    continue
                try:
                    if client.ticket < 0:
                        client.join()
                    client.heartbeat({"step": progress[0], "phase": progress[1], "beats": beats, **self.timers()})
                    last_sent, beats, sent_at, answered_at = progress, beats + 1, now, now
                except (OSError, NotAMember) as error:
                    if now - answered_at > SUPERVISOR_TIMEOUT:
                        self._supervisor_error = str(error)
