"""Preemption: SIGTERM and Ctrl-C become a request to stop, which the loop checks between two steps."""

from contextlib import ExitStack

import jax

from .core.signals import StopSignals


class StopRequest:
    """`with StopRequest() as stop: ... if stop.should_stop(step): save, exit`. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._signals = StopSignals()
        self._sync_points, self._reached = 0, False
        self._stack = ExitStack()

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._stack.enter_context(self._signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def should_stop(self, step: int) -> bool:
        """Whether to stop after `step`. Once true, it stays true.

        Several processes must call this equally often; all of them get the same answer to the same call.
        """
        del step
        if jax.process_count() == 1:
            return self._signals.requested
        # JAX's own notifier handles SIGTERM here. It agrees on a sync point that no process has reached yet, and is
        # true at this one only. Calls are counted, not steps: a step that waits for other islands calls several times,
        # and an island that takes the state of another one skips steps.
        from jax.experimental import multihost_utils

        self._sync_points += 1
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._sync_points)
        return self._reached
