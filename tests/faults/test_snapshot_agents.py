"""Real trainers on simulated hosts with keepers: a host is lost with its memory, and what is left decides the level."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from support.small_run import SMALL
from support.waiting import wait_until

from meshwright.checkpoint import manifest
from meshwright.checkpoint.redundancy import agent_files
from meshwright.train.core.event_log import read_events
from meshwright.train.launch.drain import drain

WORDS = (
    *SMALL,
    "steps=60",
    "mesh.devices=2",
    "mesh.data=1",
    "mesh.fsdp=2",
    "mesh.tensor=1",
    "elastic={backoff: 0.1, hang_floor: 30}",
    "launch.hosts=2",
    "name=run",
    "checkpoint={every: 10, keep: 99, memory_every: 1, parity: xor}",
)


def launched(directory, *changes, processes=2):
    """`meshwright launch` of as many processes as hosts, begun."""
    environment = os.environ | {"MESHWRIGHT_CACHE": str(directory.parent / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *WORDS, *changes]
    command += ["--processes", str(processes), "--devices-per-process", "1"]
    directory.mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def children(launcher):
    """(process ids of the trainers by number, of the keepers by host)."""
    trainers, keepers = {}, {}
    for child in psutil.Process(launcher.pid).children():
        words = child.cmdline()
        if "meshwright.train.launch.snapshot_agent_main" in words:
            keepers[json.loads(words[-1])["host"]] = child.pid
        elif "MESHWRIGHT_PROCESS" in child.environ():
            trainers[int(child.environ()["MESHWRIGHT_PROCESS"])] = child.pid
    return trainers, keepers


def wait_protected(launcher, directory, step, *, hosts=range(2)):
    """Wait until `step` is protected on all hosts; the directories of their slots."""
    slots = [agent_files.memory_directory(directory / "runs" / "run", host=host) for host in hosts]
    wait_until(lambda: min(agent_files.read_protected(slot).step for slot in slots) >= step, process=launcher)
    return slots


def lose(launcher, slots, hosts):
    """SIGKILL to trainer and keeper of each host, and its memory is gone."""
    trainers, keepers = children(launcher)
    for host in hosts:
        os.kill(trainers[host], signal.SIGKILL)
        os.kill(keepers[host], signal.SIGKILL)
    for host in hosts:
        shutil.rmtree(slots[host])


def finished(launcher, directory):
    """The restores of a run that ended well, and its parameters."""
    errors = launcher.communicate(timeout=300)[1].decode()
    assert launcher.returncode == 0, errors[-3000:]
    run = directory / "runs" / "run"
    blocks = {name: one.blocks for name, one in manifest.read(run / "checkpoints" / "60").arrays.items()}
    return [event for event in read_events(run) if event["event"] == "restore"], blocks


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "job"
    return finished(launched(directory), directory)[1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_is_rebuilt_from_parity(undisturbed, tmp_path, lost):
    directory = tmp_path / "job"
    launcher = launched(directory)
    slots = wait_protected(launcher, directory, 15)
    lose(launcher, slots, [lost])
    (restore,), blocks = finished(launcher, directory)
    assert restore["level"] == "parity" and restore["step"] >= 15 and f"host {lost} lost" in restore["reason"]
    assert blocks == undisturbed and not any(slot.exists() for slot in slots)


@pytest.mark.slow
def test_both_hosts_of_a_group_are_more_than_xor_bears(undisturbed, tmp_path):
    directory = tmp_path / "job"
    launcher = launched(directory)
    slots = wait_protected(launcher, directory, 15)
    lose(launcher, slots, [0, 1])
    (restore,), blocks = finished(launcher, directory)
    assert restore["level"] == "storage" and restore["step"] >= 10 and blocks == undisturbed


@pytest.mark.slow
def test_a_lost_keeper_costs_nothing_and_a_killed_trainer_goes_on_from_memory(undisturbed, tmp_path):
    directory = tmp_path / "job"
    launcher = launched(directory)
    wait_protected(launcher, directory, 10)
    os.kill(children(launcher)[1][1], signal.SIGKILL)
    wait_protected(launcher, directory, 20)  # the next one protects
    os.kill(children(launcher)[0][1], signal.SIGKILL)
    (restore,), blocks = finished(launcher, directory)
    assert restore["level"] == "memory" and restore["step"] >= 20 and blocks == undisturbed
    told = [json.loads(line) for line in (directory / "runs" / "run" / "keepers.jsonl").read_text().splitlines()]
    assert [event["event"] for event in told] == ["keeper-lost", "recovery"] and told[0]["host"] == 1


@pytest.mark.slow
def test_a_lost_node_of_a_ray_cluster_is_rebuilt_from_parity(undisturbed, tmp_path, monkeypatch):
    """Three nodes, each with a memory of its own; one that has a trainer and a keeper is lost with all three."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    directory, memory = tmp_path / "job", tempfile.TemporaryDirectory(dir="/dev/shm")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {
        cluster.add_node(num_cpus=1, env_vars={agent_files.MEMORY_VARIABLE: f"{memory.name}/{one}"}): one
        for one in "abc"
    }
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        launcher = launched(directory, "--engine", "ray")
        wait_until(lambda: sum(step >= 15 for step in memories(memory.name).values()) == 2, process=launcher)
        (gone,) = [where.relative_to(memory.name).parts[0] for where in memories(memory.name) if where.name == "host-1"]
        lost = next(node for node, one in nodes.items() if one == gone)
        raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        shutil.rmtree(f"{memory.name}/{gone}")
        cluster.remove_node(lost, allow_graceful=False)
        (restore,), blocks = finished(launcher, directory)
    finally:
        cluster.shutdown()
        memory.cleanup()
    assert restore["level"] == "parity" and restore["step"] >= 15 and "host 1 lost" in restore["reason"]
    assert blocks == undisturbed


def memories(place):
    """Directory of each host's slots -> the step that its keeper says is protected."""
    found = [word.parent for word in Path(place).glob("*/*/*/host-*/protected.json")]
    return {where: agent_files.read_protected(where).step for where in found}


FEWER = (
    "steps=120", "mesh.devices=4", "mesh.fsdp=4", "launch.hosts=4",
    "elastic={backoff: 2, hang_floor: 60, settle: 0.1, meshes: [{fsdp: 2}]}",
)  # fmt: skip


@pytest.mark.slow
def test_fewer_hosts_go_on_from_storage_and_protect_each_other_until_all_are_back(tmp_path):
    """Every process has a quarter of the state, which two processes cannot use: storage, and why is in the journal."""
    directory = tmp_path / "job"
    launcher = launched(directory, *FEWER, processes=4)
    slots = wait_protected(launcher, directory, 15, hosts=range(4))
    run = directory / "runs" / "run"
    lose(launcher, slots, [2])
    drain(run, [2])
    first = restored(launcher, run, 1)
    wait_protected(launcher, directory, first["step"] + 2, hosts=[0, 1])
    drain(run, [2], undo=True)
    second = restored(launcher, run, 2)
    wait_protected(launcher, directory, second["step"] + 2, hosts=range(4))
    launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and (first["level"], second["level"]) == ("storage", "storage")
    assert "taken in slots [0, 1, 2, 3]; slots [0, 1] go on" in first["reason"] and "of another mesh" in first["reason"]
    kinds = [event["event"] for event in read_events(run) if event["event"] in ("shrink", "grow", "unprotected")]
    assert kinds == ["shrink", "grow"] and not any(slot.exists() for slot in slots)


def restored(launcher, run, count):
    """The restore that is number `count` of the run, once it has happened."""
    restores = lambda: [event for event in read_events(run) if event["event"] == "restore"]
    return wait_until(lambda: len(restores()) >= count and restores(), process=launcher)[count - 1]
