"""A trace covers the steps asked for, as far as a sitting makes them, and is always ended."""

import pytest

from meshwright.configs.sections.training import ProfileConfig
from meshwright.train import profiling
from meshwright.train.profiling import StepProfiler


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (range(1, 9), [("start", 3), ("stop", 5)]),
        (range(4, 9), [("start", 4), ("stop", 5)]),  # goes on among them
        (range(1, 5), [("start", 3), ("stop", 4)]),  # stopped among them
        (range(6, 9), []),
    ],
)
def test_a_trace_covers_the_steps_that_the_session_makes(monkeypatch, tmp_path, steps, told):
    seen, now = [], []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda path: seen.append(("start", now[-1])))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: seen.append(("stop", now[-1])))
    profile = StepProfiler(ProfileConfig(start=3, steps=3), tmp_path)
    for number in steps:
        now.append(number)
        with profile.step(number):
            pass
    profile.close()
    assert seen == told
