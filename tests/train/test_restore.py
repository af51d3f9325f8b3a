"""A run over damaged checkpoints: the newest whole one is used, damage is set aside, nothing starts from scratch."""

import shutil

import pytest
from support.equivalence import tiny
from support.interrupted_run import train_until_killed
from typer.testing import CliRunner

from meshwright.checkpoint import manifest
from meshwright.checkpoint.redundancy.agent_files import memory_directory
from meshwright.checkpoint.storage import Storage
from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.train.cli.main import app
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.run import train


def small(**changes):
    base = {"steps": 4, "checkpoint": {"every": 1, "keep": 2}, "logging": {"every": 1, "tensorboard": False},
            "model": {"vocab": 384, "layers": 1}, "data": {"held_out": 0}}  # fmt: skip
    return tiny(**{**base, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps; checkpoints 3 and 4 are kept."""
    root = tmp_path_factory.mktemp("finished")
    train(small(), process_info=ProcessInfo(), root=root)
    return root


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished / "run", tmp_path / "run")


def damage(run, *steps):
    """One bit of the largest payload file."""
    for step in steps:
        file = max((run / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)
        text = bytearray(file.read_bytes())
        text[len(text) // 2] ^= 4
        file.write_bytes(text)


def events(run, *names):
    return [event for event in read_events(run) if event["event"] in names]


def verbs(*arguments):
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return done.exit_code, done.output, done.exception


def test_retention_keeps_what_the_configuration_says(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "4"]
    assert [event["step"] for event in events(run, "commit")] == [1, 2, 3, 4]


def test_the_newest_undamaged_checkpoint_is_used_and_the_damaged_one_quarantined(run):
    damage(run, 4)
    train(small(steps=5), process_info=ProcessInfo(), root=run.parent)
    aside, restore = events(run, "quarantine", "restore")[-2:]
    assert (aside["event"], aside["step"], aside["place"]) == ("quarantine", 4, "quarantine/4")
    assert (restore["step"], restore["reason"]) == (3, "4 in storage is damaged")
    assert (run / "checkpoints" / "quarantine" / "4" / "state").is_dir()
    assert [event["step"] for event in events(run, "commit")] == [1, 2, 3, 4, 4, 5]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_step_0(run):
    damage(run, 3, 4)
    for _ in range(2):  # nor the second time
        with pytest.raises(MeshwrightError, match=r"every checkpoint in .* is damaged.*quarantine"):
            train(small(steps=5), process_info=ProcessInfo(), root=run.parent)
    assert len(events(run, "start")) == 1 and events(run, "failure")


def test_the_verbs_list_verify_and_repair(run):
    code, output, _ = verbs("verify", run)
    assert code == 0 and "whole: all 2 that are committed" in output and "committed" in verbs("ls", run)[1]
    damage(run, 4)
    code, output, _ = verbs("verify", run)
    assert code == 1 and "damaged: [4]; `meshwright checkpoint repair" in output and "checkpoints/4" in output
    assert "step 4 quarantined" in verbs("repair", run)[1] and verbs("verify", run)[0] == 0
    aside = run / "checkpoints" / "quarantine" / "4"
    file = max(aside.rglob("d/*"), key=lambda path: path.stat().st_size)
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 4
    file.write_bytes(text)  # a good copy was brought back
    assert "step 4 is intact" in verbs("repair", run)[1] and "nothing to repair" in verbs("repair", run)[1]


def test_a_full_disk_is_recorded_and_training_goes_on(tmp_path, monkeypatch):
    """The save of step 2 fails, later ones do not: the run ends well."""
    original = Storage.save

    def full(self, state, *, step, data):
        if step == 2:
            raise UserError("checkpoint 2 could not be written")
        original(self, state, step=step, data=data)

    monkeypatch.setattr(Storage, "save", full)
    train(small(), process_info=ProcessInfo(), root=tmp_path)
    failed = events(tmp_path / "run", "save-failed")
    assert [event["step"] for event in failed] == [2]
    assert [event["step"] for event in events(tmp_path / "run", "commit")] == [1, 3, 4]


@pytest.mark.parametrize(("policy", "steps"), [("continue", [3, 4]), ("stop", [3])])
def test_a_run_whose_last_save_failed_fails(tmp_path, monkeypatch, policy, steps):
    original = Storage.save

    def full(self, state, *, step, data):
        if step >= 3:
            raise UserError(f"checkpoint {step} could not be written")
        original(self, state, step=step, data=data)

    monkeypatch.setattr(Storage, "save", full)
    with pytest.raises(UserError, match=f"checkpoint {steps[-1]} could not be written"):
        train(small(checkpoint={"every": 1, "on_failure": policy}), process_info=ProcessInfo(), root=tmp_path)
    found = {event["step"] for event in events(tmp_path / "run", "save-failed")}
    assert sorted(found) == steps and not events(tmp_path / "run", "finish")


def slot_files(root):
    return sorted(memory_directory(root / "run", host=0).glob("*.[01]"))


def test_a_killed_run_goes_on_from_memory(tmp_path, finished):
    """Killed after step 3; storage has step 2, memory step 3: not a step is made again, and nothing is left behind."""
    config = small(checkpoint={"every": 2, "keep": 9, "memory_every": 1})
    train_until_killed(config, tmp_path, step=4)
    assert len(slot_files(tmp_path)) == 2
    train(config, process_info=ProcessInfo(), root=tmp_path)
    (restore,) = events(tmp_path / "run", "restore")
    assert (restore["step"], restore["level"]) == (3, "memory") and not slot_files(tmp_path)
    fingerprints = [manifest.read(run / "checkpoints" / "4").arrays for run in (tmp_path / "run", finished / "run")]
    assert fingerprints[0] == fingerprints[1]


def test_a_damaged_snapshot_is_skipped(tmp_path):
    """Both newer snapshots have a flipped bit: storage is used, and the event log says why."""
    config = small(checkpoint={"every": 1, "keep": 9, "memory_every": 1})
    train_until_killed(config, tmp_path, step=4)
    for file in slot_files(tmp_path):
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
    train(config, process_info=ProcessInfo(), root=tmp_path)
    aside = [(event["level"], event["step"]) for event in events(tmp_path / "run", "quarantine")]
    (restore,) = events(tmp_path / "run", "restore")
    assert aside[0] == ("memory", 3) and restore["level"] == "storage" and restore["reason"].endswith("is damaged")
