"""A profiler trace of the steps the configuration asks for, under `profile/` in the run directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from ..configs.sections.training import ProfileConfig


class Profile:
    """`with profile.step(n):` around every step; traces `steps` of them from `start` on, as far as they are made here.

    `close` ends a trace that the last step did not.
    """

    def __init__(self, profile: ProfileConfig, directory: Path):
        self._first, self._last = profile.start, profile.start + profile.steps - 1
        self._directory = directory / "profile"
        self._tracing = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One step of the loop."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._tracing:  # the first of them, or the first of a sitting that goes on among them
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is under way."""
        if self._tracing:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._tracing = False
