"""Asked to stop: SIGTERM and Ctrl-C become a request that the loop answers between two steps."""

from contextlib import ExitStack

import jax

from .core.signals import StopSignals


class StopRequest:
    """`with StopRequest() as stop: ... if stop.requested(step): save and leave`. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._signals = StopSignals()
        self._questions, self._reached = 0, False
        self._held = ExitStack()

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._held.enter_context(self._signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def requested(self, step: int) -> bool:
        """Whether to stop, asked after `step`, as often as one likes; once it is yes, it stays so.

        Several processes ask equally often, and all of them get the same answer to the same question.
        """
        del step
        if jax.process_count() == 1:
            return self._signals.asked
        # JAX's own notifier has taken SIGTERM; it agrees on a question that no process has put, and says yes to that
        # one alone. Questions are counted, not steps: there are several in a step that waits for other islands, and an
        # island that takes another's state leaves steps out.
        from jax.experimental import multihost_utils

        self._questions += 1
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._questions)
        return self._reached
