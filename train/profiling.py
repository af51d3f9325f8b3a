"""A profiler trace of the steps the configuration asks for, under `profile/` in the run directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from ..configs.training import ProfileConfig


class Profile:
    """`with profile.step(n):` around every step; traces `steps` of them from `start` on."""

    def __init__(self, profile: ProfileConfig, directory: Path):
        self._first, self._last = profile.start, profile.start + profile.steps - 1
        self._directory = directory / "profile"

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One step of the loop."""
        if self._last < self._first:
            yield
            return
        if number == self._first:
            jax.profiler.start_trace(str(self._directory))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            jax.effects_barrier()
            jax.profiler.stop_trace()
