"""A whole run: what it leaves behind, and that stopping and going on changes nothing."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from support.equivalence import tiny
from support.interrupted_run import train_until_killed, train_until_stopped
from support.run_files import losses, metric_rows
from support.waiting import HANG_SECONDS, wait_until

from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.loader import dump_yaml
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.core.run_directory import open_directory
from meshwright.train.loop import Loop
from meshwright.train.run import train

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def small(**changes):
    """A run of six steps with a checkpoint, an evaluation and a sample at the third."""
    base = {
        "steps": 6,
        "model": {"vocab": 384, "dropout": 0.1},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3, "prompts": ["ab"], "sample_tokens": 4},
        "logging": {"every": 1, "tensorboard": False},
    }
    return tiny(**{**base, **changes})


def go(config, root):
    return train(config, process_info=ProcessInfo(), root=root)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The uninterrupted run."""
    root = tmp_path_factory.mktemp("uninterrupted")
    summary = go(small(mesh=MESH), root)
    return root, summary


def test_a_run_leaves_the_whole_directory(uninterrupted):
    root, summary = uninterrupted
    names = {file.name for file in (root / "run").iterdir()}
    assert {"config.yaml", "environment.json", "plan.json", "metrics.jsonl", "events.jsonl", "checkpoints"} <= names
    assert {"report.html", "tokenizer.json"} <= names
    events = [event["event"] for event in read_events(root / "run")]
    assert [name for name in events if name in ("start", "save", "commit", "finish")] == (
        ["start", "save", "commit", "save", "commit", "finish"]
    )
    assert events.count("evaluation") == 2 and events.count("sample") == 2
    assert summary.metrics["held_out_bits_per_byte"] > 0 and len(losses(root / "run")) == 6


def test_a_run_stopped_and_resumed_on_another_mesh_has_the_same_losses(uninterrupted, tmp_path):
    """Stopped after step 4, resumed on another mesh: the same losses, to rounding."""
    train_until_stopped(small(mesh=MESH), tmp_path, step=4)
    go(small(mesh={"data": 4}), tmp_path)
    there, here = losses(uninterrupted[0] / "run"), losses(tmp_path / "run")
    assert there.keys() == here.keys() and max(abs(there[step] - here[step]) for step in there) < 1e-4
    restore = next(event for event in read_events(tmp_path / "run") if event["event"] == "restore")
    assert (restore["step"], restore["level"]) == (4, "storage")


def test_a_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    """Killed without warning after step 5: the newest checkpoint is step 3, and every later step is the same again."""
    train_until_killed(small(mesh=MESH), tmp_path, step=5)
    go(small(mesh=MESH), tmp_path)
    assert losses(tmp_path / "run") == losses(uninterrupted[0] / "run")
    assert [row["step"] for row in metric_rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_directory_of_another_run_is_refused_and_left_alone(uninterrupted):
    root, _ = uninterrupted
    before = (root / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"name: .*run .*optimizer.learning_rate=0.01 "):
        go(small(mesh=MESH, optimizer={"learning_rate": 0.02}), root)
    assert (root / "run" / "config.yaml").read_text() == before


def test_a_directory_appears_with_its_configuration(tmp_path, monkeypatch):
    """Another process that looks in between must not take it for something that is not a run."""
    seen = []

    def look_before(move):
        def look_and_move(*paths):
            seen.append(open_directory(small(), root=tmp_path, name="run", write=False))
            move(*paths)

        return look_and_move

    for name in ("rename", "replace"):
        monkeypatch.setattr(f"os.{name}", look_before(getattr(os, name)))
    for _ in range(2):
        open_directory(small(), root=tmp_path, name="run")
    assert len(seen) == 2 and [one.name for one in tmp_path.rglob("*")] == ["run", "config.yaml"]


def test_fewer_steps_than_the_run_has_made_are_refused(uninterrupted):
    root, _ = uninterrupted
    before = (root / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"steps: 3.*run.* 6"):
        go(small(mesh=MESH, steps=3), root)
    assert (root / "run" / "config.yaml").read_text() == before


def test_more_steps_with_a_privacy_budget_are_another_run(tmp_path):
    private = {"privacy": {"epsilon": 8.0}, "data": {"packing": {"method": "single"}}, "model": {}, "mesh": {}}
    open_directory(small(**private), root=tmp_path)
    with pytest.raises(UserError, match=r"steps=6 \(now 60\)"):
        open_directory(small(**private, steps=60), root=tmp_path)
    open_directory(small(steps=6), root=tmp_path, name="open")
    open_directory(small(steps=60), root=tmp_path, name="open")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path, monkeypatch):
    original = Loop.batches

    def poisoned(self, start):
        for number, batch in enumerate(original(self, start)):
            yield {**batch, "loss_weights": batch["loss_weights"] * (np.nan if number == 2 else 1)}

    monkeypatch.setattr(Loop, "batches", poisoned)
    with pytest.raises(MeshwrightError, match=r"step 3: loss nan.*the update was not applied"):
        go(small(checkpoint={"every": 0}, evaluation={"every": 0}), tmp_path)
    assert read_events(tmp_path / "run")[-1]["event"] == "failure"
    assert not list((tmp_path / "run" / "checkpoints").glob("*[0-9]"))


def test_sigterm_saves_and_exits_75_and_the_same_command_finishes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(small(steps=400, evaluation={"every": 0}, checkpoint={"every": 0})))
    command = [sys.executable, "-m", "meshwright.train.cli", "train", str(file)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process=process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75 and "state saved; run the same command to go on" in errors
    saved = [event["step"] for event in read_events(tmp_path / "runs" / "run") if event["event"] == "commit"]
    longer = [*command, f"steps={saved[-1] + 2}"]
    done = subprocess.run(longer, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "runs" / "run")) == list(range(1, saved[-1] + 3))
