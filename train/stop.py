"""Asked to stop: SIGTERM and Ctrl-C become a request that the loop answers between two steps."""

import signal
from types import FrameType

import jax


class StopRequest:
    """`with StopRequest() as stop: ... if stop.requested(step): save and leave`. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._before = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self._asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. With several processes, all of them get the same answer at the same step."""
        if jax.process_count() == 1:
            return self._asked
        # JAX's own notifier has taken SIGTERM; it agrees on a step that no process has passed.
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
