"""Asked to stop: SIGTERM and Ctrl-C become a request that the loop answers between two steps."""

from contextlib import ExitStack

import jax

from .launch.signals import StopSignals


class StopRequest:
    """`with StopRequest() as stop: ... if stop.requested(step): save and leave`. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._signals = StopSignals()
        self._held = ExitStack()

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._held.enter_context(self._signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. With several processes, all of them get the same answer at the same step."""
        if jax.process_count() == 1:
            return self._signals.asked
        # JAX's own notifier has taken SIGTERM; it agrees on a step that no process has passed.
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
