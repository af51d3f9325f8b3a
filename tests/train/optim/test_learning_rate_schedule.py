"""Schedules of the learning rate: exact values, warm-up, decay."""

from typing import get_args

import pytest

from meshwright.configs.sections.training import OptimizerConfig
from meshwright.train.optim.learning_rate_schedule import learning_rate_schedule

SCHEDULES = {
    # 20 updates, the first 4 of them warm-up; update -> fraction of the peak
    "constant": ("constant", {}, {0: 0.25, 3: 1, 4: 1, 19: 1}),
    "cosine": ("cosine", {}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 19: 0.1}),
    "linear": ("linear", {}, {0: 0.25, 3: 1, 4: 1, 9: 0.7, 19: 0.1}),
    "wsd": ("wsd", {"decay_steps": 5}, {3: 1, 14: 1, 15: 0.82, 19: 0.1}),
    "wsd, a tenth": ("wsd", {}, {17: 1, 18: 0.55, 19: 0.1}),
}


@pytest.mark.parametrize(("name", "more", "values"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_has_its_exact_values(name, more, values):
    section = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=4, final_fraction=0.1, **more)
    schedule = learning_rate_schedule(section, steps=20)
    found = {count: float(schedule(count)) / 2.0 for count in values}
    assert found == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("name", get_args(OptimizerConfig.model_fields["schedule"].annotation))
def test_a_schedule_warms_up_to_its_peak_and_then_only_falls(name):
    section = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=4, final_fraction=0.1)
    schedule = learning_rate_schedule(section, steps=20)
    values = [float(schedule(count)) / 2.0 for count in range(20)]
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[3:] == pytest.approx(sorted(values[3:], reverse=True))
    assert values[-1] == pytest.approx(1.0 if name == "constant" else 0.1)


def test_a_cosine_is_halfway_in_the_middle():
    section = OptimizerConfig(learning_rate=1.0, schedule="cosine", final_fraction=0.0)
    assert float(learning_rate_schedule(section, steps=21)(10)) == pytest.approx(0.5)
