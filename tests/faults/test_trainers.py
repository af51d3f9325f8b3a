"""Real trainers: one is killed in the middle, and the run ends with the undisturbed run's parameters."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from meshwright.checkpoint import manifest
from meshwright.train.report.journal import read_events

SMALL = (
    "steps=60", "logging.every=1", "model.layers=1", "model.embed=32", "model.heads=2", "model.kv_heads=2",
    "model.mlp=32", "model.vocab=384", "data.source=synthetic",
    "data.tokenizer={bytes: true, train: null, vocab: null}", "data.held_out=0",
    "data.sequence_length=32", "data.global_batch=8", "evaluation.prompts=[]", "logging.tensorboard=false",
    "optimizer.warmup_steps=0", "mesh.devices=2", "mesh.data=2", "mesh.fsdp=1", "mesh.tensor=1",
    "checkpoint={every: 10, keep: 99}", "elastic={backoff: 0.1, hang_floor: 20}",
)  # fmt: skip


def launched(directory, name):
    """`meshwright launch` of two processes, begun."""
    environment = os.environ | {"MESHWRIGHT_CACHE": str(directory / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *SMALL, f"name={name}"]
    command += ["--processes", "2", "--devices-per-process", "1"]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def trainers(launcher):
    """Process ids of the trainers, by number."""
    children = [(child.pid, child.environ()) for child in psutil.Process(launcher.pid).children()]
    return {int(told["MESHWRIGHT_PROCESS"]): pid for pid, told in children if "MESHWRIGHT_PROCESS" in told}


def finished(launcher):
    errors = launcher.communicate(timeout=240)[1].decode()
    assert launcher.returncode == 0, errors[-3000:]


def fingerprints(directory, name):
    """Of every logical array after the last step."""
    found = manifest.read(directory / "runs" / name / "checkpoints" / "60")
    return {name: entry.blocks for name, entry in found.arrays.items()}


def events(directory, name):
    file = directory / "runs" / name
    return read_events(file) if file.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    finished(launched(directory, "whole"))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_parameters_are_the_undisturbed_runs_bit_for_bit(undisturbed, tmp_path, victim, how):
    launcher = launched(tmp_path, "run")
    deadline = time.monotonic() + 120
    while not any(event["event"] == "commit" for event in events(tmp_path, "run")):
        assert launcher.poll() is None and time.monotonic() < deadline, "no commit"
        time.sleep(0.02)
    os.kill(trainers(launcher)[victim], how)
    finished(launcher)
    assert fingerprints(tmp_path, "run") == fingerprints(undisturbed, "whole")
    told = [event for event in events(tmp_path, "run") if event["event"] in ("restart", "restore", "finish")]
    assert [event["event"] for event in told] == ["restart", "restore", "finish"] and told[0]["suspect"] == victim
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
