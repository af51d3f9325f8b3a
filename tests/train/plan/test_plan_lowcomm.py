"""`meshwright plan lowcomm`: the published table, a plan for a configuration and a link, and errors."""

import json

import pytest
from typer.testing import CliRunner

from meshwright.configs.errors import UserError
from meshwright.train.cli.main import app


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_published_table_is_printed_with_ratios():
    plan = json.loads(run("lowcomm", "--json").stdout)
    assert len(plan["bandwidth"]) == 75 and {"simulated", "paper", "ratio"} <= plan["bandwidth"][0].keys()
    assert plan["latency"][-1]["replicas"] == 4096
    assert "10B" in run("lowcomm").stdout


def test_islands_send_their_whole_payload_to_every_other_island():
    options = ("--step-seconds", "0.5", "--gigabits", "0.05", "--json")
    arguments = ("outer.wire=float32", "islands.count=4")
    mesh = json.loads(run("lowcomm", "lowcomm/diloco", "mesh={replica: 4, devices: 16}", *options).stdout)
    islands = json.loads(run("lowcomm", "lowcomm/diloco", "mesh={replica: 1, devices: 4}", *arguments, *options).stdout)
    assert islands["peak_bytes"] == 2 * mesh["peak_bytes"]


def test_a_plan_compares_the_configuration_with_diloco_and_data_parallelism():
    options = ("lowcomm/streaming", "--step-seconds", "0.5", "--gigabits", "0.05", "--json")
    plan = json.loads(run("lowcomm", *options).stdout)
    rates = list(plan["computing"].values())
    assert rates == sorted(rates) and rates[0] < 0.6 and rates[2] == pytest.approx(1)
    assert plan["times_fewer_bytes"] > 100 and len(plan["meetings"]) == 4
    assert plan["peak_bytes"] == max(item["bytes"] for item in plan["meetings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lowcomm", "lowcomm/noloco"], "--step-seconds 2 --gigabits 0.1"),
        (["lowcomm", "quickstart", "--gigabits", "1"], "outer: null in quickstart"),
        (["lowcomm", "--gigabits", "1"], "name a CONFIG too"),
        (["quickstart", "--gigabits", "1"], "they belong to `plan lowcomm CONFIG`, not to `plan quickstart`"),
    ],
)
def test_missing_and_misplaced_options_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        raise run(*arguments).exception
