"""Writes a profiler trace of the steps in `logging.profile` to `profile/` in the run directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from ..configs.sections.training import ProfileConfig


class StepProfiler:
    """`with profiler.step(n):` around every step traces `profile.steps` steps from `profile.start` on.

    `close` ends a trace whose last step this session did not reach.
    """

    def __init__(self, profile: ProfileConfig, directory: Path):
        self._first, self._last = profile.start, profile.start + profile.steps - 1
        self._directory = directory / "profile"
        self._tracing = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number` inside the block."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._tracing:  # the first step to trace, or a session that starts among these steps
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace that is under way, if there is one."""
        if self._tracing:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._tracing = False
