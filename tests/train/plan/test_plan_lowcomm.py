"""`meshwright plan lowcomm`: the published table, one's own link, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from meshwright.configs.errors import UserError
from meshwright.train.cli.main import app


def run(*words):
    return CliRunner().invoke(app, ["plan", *words])


def test_the_published_table_is_printed_with_ratios():
    found = json.loads(run("lowcomm", "--json").stdout)
    assert len(found["bandwidth"]) == 75 and {"simulated", "paper", "ratio"} <= found["bandwidth"][0].keys()
    assert found["latency"][-1]["replicas"] == 4096
    assert "10B" in run("lowcomm").stdout


def test_islands_send_their_payloads_whole_to_everybody():
    given = ("--step-seconds", "0.5", "--gigabits", "0.05", "--json")
    words = ("outer.wire=float32", "islands.count=4")
    mesh = json.loads(run("lowcomm", "lowcomm/diloco", "mesh={replica: 4, devices: 16}", *given).stdout)
    islands = json.loads(run("lowcomm", "lowcomm/diloco", "mesh={replica: 1, devices: 4}", *words, *given).stdout)
    assert islands["peak_bytes"] == 2 * mesh["peak_bytes"]


def test_ones_own_model_step_and_link():
    given = ("lowcomm/streaming", "--step-seconds", "0.5", "--gigabits", "0.05", "--json")
    found = json.loads(run("lowcomm", *given).stdout)
    rates = list(found["computing"].values())
    assert rates == sorted(rates) and rates[0] < 0.6 and rates[2] == pytest.approx(1)
    assert found["times_fewer_bytes"] > 100 and len(found["meetings"]) == 4
    assert found["peak_bytes"] == max(one["bytes"] for one in found["meetings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lowcomm", "lowcomm/noloco"], "--step-seconds 2 --gigabits 0.1"),
        (["lowcomm", "quickstart", "--gigabits", "1"], "outer: not set in quickstart"),
        (["lowcomm", "--gigabits", "1"], "name a CONFIG too"),
        (["quickstart", "--gigabits", "1"], "they belong to `plan lowcomm CONFIG`, not to `plan quickstart`"),
    ],
)
def test_what_is_missing_or_out_of_place_is_said(words, message):
    with pytest.raises(UserError, match=message):
        raise run(*words).exception
