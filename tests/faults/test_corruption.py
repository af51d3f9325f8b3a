"""A device that remembers wrongly: one bit of a parameter flips in its memory, in the middle of a run."""

import sys
from pathlib import Path

import pytest
from support.corruption import flips
from support.equivalence import tiny
from support.launched_run import events_of, final_parameters
from support.small_run import SMALL

from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_local
from meshwright.train.loop import Loop
from meshwright.train.run import train
from meshwright.train.sdc_check import CorruptedStateError


def small(**changes):
    base = {"steps": 5, "checkpoint": {"every": 1, "keep": 9, "compare": True}, "mesh": {"data": 4, "devices": 4},
            "logging": {"every": 1, "tensorboard": False}, "model": {"vocab": 384, "layers": 1},
            "data": {"held_out": 0}, "optimizer": {"name": "sgd"}}  # fmt: skip
    return tiny(**{**base, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    train(small(), process_info=ProcessInfo(), root=root)
    return final_parameters(root / "run")


def test_a_run_stops_before_it_saves_what_a_device_has_damaged(undisturbed, tmp_path, monkeypatch):
    """The array and the device are named, and the run goes on from before, to the end it would have had."""
    monkeypatch.setattr(Loop, "drain", flips(Loop.drain, step=3, device=2))
    blame = r"step 3 is not saved: params/\S+ has other bits on devices 2 \(process 0\) than on devices 0, 1, 3"
    with pytest.raises(CorruptedStateError, match=blame):
        train(small(), process_info=ProcessInfo(), root=tmp_path)
    assert max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) == 2
    monkeypatch.undo()
    train(small(), process_info=ProcessInfo(), root=tmp_path)
    assert final_parameters(tmp_path / "run") == undisturbed


def test_without_the_check_a_corrupted_run_ends_well_with_other_parameters(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "drain", flips(Loop.drain, step=3, device=0))
    train(small(checkpoint={"every": 1, "keep": 9, "compare": False}), process_info=ProcessInfo(), root=tmp_path)
    assert final_parameters(tmp_path / "run") != undisturbed


OPTIONS = (
    *SMALL,
    "steps=30",
    "mesh={devices: 4, data: 4, fsdp: 1, tensor: 1}",
    "checkpoint={every: 5, keep: 99, compare: true}",
    "name=run",
)
PATCHED = """
import os
from support.corruption import flips
from meshwright.train.loop import Loop
if (os.environ["MESHWRIGHT_EPOCH"], os.environ["MESHWRIGHT_PROCESS"]) == ("1", "1"):
    Loop.drain = flips(Loop.drain, step=15, device=1)
from meshwright.train.cli.main import main
main()
"""


@pytest.mark.slow
def test_the_launcher_blames_the_process_of_the_device_and_starts_again_from_before(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", PATCHED, "train", "quickstart", *OPTIONS]
    run = tmp_path / "runs" / "run"
    launch_local(Job("run", command, 2, run, ElasticConfig(backoff=0.1, hang_floor=60), devices_per_process=2))
    events = events_of(run, "failure", "restart", "restore", "finish")
    assert [event["event"] for event in events] == ["failure", "restart", "restore", "finish"]
    assert events[1]["suspect"] == 1 and events[2]["step"] == 10 and "(process 1) than on" in events[0]["message"]
