"""What `meshwright bench lowcomm islands` compares: rows differ in what they are named for, whatever else is typed."""

from argparse import Namespace

import pytest

from meshwright.benchmarks.islands import row_overrides
from meshwright.configs.loader import load_config

OPTIONS = Namespace(steps=48, reference_steps=8, bandwidth="100Mbit", latency="50ms", words=["outer.every=12"])


@pytest.mark.parametrize("row, rule", [("undisturbed", ("streaming", 12, 48)), ("every-step", ("local-sgd", 1, 8))])
def test_a_row_meets_as_its_name_says(row, rule):
    config = load_config("lowcomm/islands", overrides=row_overrides(OPTIONS, row))
    assert (config.outer.name, config.outer.every, config.steps) == rule
