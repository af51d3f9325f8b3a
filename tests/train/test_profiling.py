"""A trace covers the steps asked for, as far as the session makes them, and always ends."""

import pytest

from meshwright.configs.sections.training import ProfileConfig
from meshwright.train import profiling
from meshwright.train.profiling import StepProfiler


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 9), [("start", 3), ("stop", 5)]),
        (range(4, 9), [("start", 4), ("stop", 5)]),  # the session starts among them
        (range(1, 5), [("start", 3), ("stop", 4)]),  # the session ends among them
        (range(6, 9), []),
    ],
)
def test_a_trace_covers_the_steps_that_the_session_makes(monkeypatch, tmp_path, steps, expected):
    seen, now = [], []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda path: seen.append(("start", now[-1])))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: seen.append(("stop", now[-1])))
    profiler = StepProfiler(ProfileConfig(start=3, steps=3), tmp_path)
    for number in steps:
        now.append(number)
        with profiler.step(number):
            pass
    profiler.close()
    assert seen == expected
