"""`meshwright bench lowcomm islands`: rows differ in their outer optimizer, and take the user's overrides."""

from argparse import Namespace

import pytest

from meshwright.benchmarks.islands import row_overrides
from meshwright.configs.loader import load_config

OPTIONS = Namespace(steps=48, reference_steps=8, bandwidth="100Mbit", latency="50ms", overrides=["outer.every=12"])


@pytest.mark.parametrize("row, rule", [("undisturbed", ("streaming", 12, 48)), ("every-step", ("local-sgd", 1, 8))])
def test_a_row_has_the_outer_optimizer_of_its_name(row, rule):
    config = load_config("lowcomm/islands", overrides=row_overrides(OPTIONS, row))
    assert (config.outer.name, config.outer.every, config.steps) == rule
