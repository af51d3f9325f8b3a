"""Real trainers: one is killed in the middle, and the run ends with the undisturbed run's parameters."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from support.small_run import SMALL
from support.waiting import wait_until

from meshwright.checkpoint import manifest
from meshwright.train.core.event_log import read_events

WORDS = (
    *SMALL,
    "steps=60",
    "mesh.devices=2",
    "mesh.data=2",
    "mesh.fsdp=1",
    "mesh.tensor=1",
    "checkpoint={every: 10, keep: 99}",
    "elastic={backoff: 0.1, hang_floor: 20}",
)


def launched(directory, name, *options, **variables):
    """`meshwright launch` of two processes, begun."""
    environment = os.environ | {"MESHWRIGHT_CACHE": str(directory / "cache"), "XLA_FLAGS": ""} | variables
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *WORDS, f"name={name}"]
    command += ["--processes", "2", "--devices-per-process", "1", *options]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def trainers(launcher):
    """Process ids of the trainers, by number."""
    children = [(child.pid, child.environ()) for child in psutil.Process(launcher.pid).children()]
    return {int(told["MESHWRIGHT_PROCESS"]): pid for pid, told in children if "MESHWRIGHT_PROCESS" in told}


def finished(launcher):
    errors = launcher.communicate(timeout=600)[1].decode()
    assert launcher.returncode == 0, errors[-3000:]


def fingerprints(directory, name):
    """Of every logical array after the last step."""
    found = manifest.read(directory / "runs" / name / "checkpoints" / "60")
    return {name: entry.blocks for name, entry in found.arrays.items()}


def events(directory, name):
    file = directory / "runs" / name
    return read_events(file) if file.exists() else []


def wait_committed(launcher, directory):
    wait_until(lambda: "commit" in [event["event"] for event in events(directory, "run")], process=launcher)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    finished(launched(directory, "whole"))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_parameters_are_the_undisturbed_runs_bit_for_bit(undisturbed, tmp_path, victim, how):
    launcher = launched(tmp_path, "run")
    wait_committed(launcher, tmp_path)
    os.kill(trainers(launcher)[victim], how)
    finished(launcher)
    assert fingerprints(tmp_path, "run") == fingerprints(undisturbed, "whole")
    told = [event for event in events(tmp_path, "run") if event["event"] in ("restart", "restore", "finish")]
    assert [event["event"] for event in told] == ["restart", "restore", "finish"] and told[0]["suspect"] == victim
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))


@pytest.mark.slow
def test_a_run_on_ray_goes_through_the_loss_of_a_node_bit_for_bit(undisturbed, tmp_path):
    """The command a user types, on a cluster of three nodes; one that holds a trainer is killed after a commit."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    try:
        launcher = launched(tmp_path, "run", "--engine", "ray", RAY_ADDRESS=cluster.address)
        wait_committed(launcher, tmp_path)
        lost = next(node for node in nodes if raylet(node) in above(trainer(launcher)))
        cluster.remove_node(lost, allow_graceful=False)
        finished(launcher)
    finally:
        cluster.shutdown()
    assert fingerprints(tmp_path, "run") == fingerprints(undisturbed, "whole")
    told = [event for event in events(tmp_path, "run") if event["event"] in ("restart", "restore", "finish")]
    assert [event["event"] for event in told] == ["restart", "restore", "finish"]
    assert "lost with" in told[0]["reason"]


def trainer(launcher):
    """Process 1 of the run, wherever Ray has put it."""
    mine = next(one for one in psutil.process_iter() if one.pid == launcher.pid).environ()["MESHWRIGHT_CACHE"]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            told = process.environ()
            if told.get("MESHWRIGHT_PROCESS") == "1" and told.get("MESHWRIGHT_CACHE") == mine:
                return process
    raise AssertionError("no trainer is there")


def above(process):
    """Process ids of its parents, and theirs."""
    return {parent.pid for parent in process.parents()}


def raylet(node):
    """The process id of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid
