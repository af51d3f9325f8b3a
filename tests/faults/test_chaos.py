"""A minute of `meshwright bench chaos`: real trainers, random faults, and the run that was left alone beside it."""

import pytest

from meshwright.benchmarks.chaos import main
from meshwright.train.core.event_log import read_events

SMALL = ("model.layers=1", "model.embed=32", "model.mlp=32", "data.source=synthetic", "data.sequence_length=32",
         "elastic.replace=1", "elastic.settle=1")  # fmt: skip


@pytest.mark.slow
def test_a_run_under_a_random_killer_ends_as_the_one_left_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    main(["elastic/demo", *SMALL, "--minutes=1.5", "--every=2", "--seed=1"])  # raises where a promise was broken
    out = capfd.readouterr().out
    assert out.count(" kept ") == 7 and "BROKEN" not in out
    [directory] = [path for path in (tmp_path / "runs").glob("chaos-*") if path.is_dir() and "alone" not in path.name]
    assert {"restart", "restore", "finish"} <= {event["event"] for event in read_events(directory)}
