"""Real trainers on simulated hosts with snapshot agents: hosts are lost with their memory, and the run goes on."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest
from support.launched_run import child_processes, events_of, final_parameters, finish_launch, start_launch
from support.small_run import SMALL
from support.waiting import wait_until

from meshwright.checkpoint.redundancy import agent_files
from meshwright.train.core.jsonl import read_rows
from meshwright.train.launch.drain import drain

OPTIONS = (
    *SMALL, "steps=60", "mesh={devices: 2, data: 1, fsdp: 2, tensor: 1}", "elastic={backoff: 0.1, hang_floor: 30}",
    "launch.hosts=2", "name=run", "checkpoint={every: 10, keep: 99, memory_every: 1, parity: xor}",
)  # fmt: skip


def wait_protected(launcher, directory, step, *, hosts=range(2)):
    """Wait until `step` is protected on all hosts; the directories of their slots."""
    slots = [agent_files.memory_directory(directory / "runs" / "run", host=host) for host in hosts]
    wait_until(lambda: min(agent_files.read_protected(slot).step for slot in slots) >= step, process=launcher)
    return slots


def lose(launcher, slots, hosts):
    """Kill trainer and snapshot agent of each host, and delete its memory."""
    trainers, agents = child_processes(launcher)
    for host in hosts:
        os.kill(trainers[host], signal.SIGKILL)
        os.kill(agents[host], signal.SIGKILL)
    for host in hosts:
        shutil.rmtree(slots[host])


def finish(launcher, directory):
    """The restores of a run that ended well, and its parameters."""
    finish_launch(launcher)
    run = directory / "runs" / "run"
    return events_of(run, "restore"), final_parameters(run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "job"
    return finish(start_launch(directory, *OPTIONS), directory)[1]


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_lost_host_is_rebuilt_from_parity(undisturbed, tmp_path, host):
    directory = tmp_path / "job"
    launcher = start_launch(directory, *OPTIONS)
    slots = wait_protected(launcher, directory, 15)
    lose(launcher, slots, [host])
    (restore,), parameters = finish(launcher, directory)
    assert restore["level"] == "parity" and restore["step"] >= 15 and f"host {host} lost" in restore["reason"]
    assert parameters == undisturbed and not any(slot.exists() for slot in slots)


@pytest.mark.slow
def test_two_lost_hosts_of_a_group_are_restored_from_storage_under_xor(undisturbed, tmp_path):
    directory = tmp_path / "job"
    launcher = start_launch(directory, *OPTIONS)
    slots = wait_protected(launcher, directory, 15)
    lose(launcher, slots, [0, 1])
    (restore,), parameters = finish(launcher, directory)
    assert restore["level"] == "storage" and restore["step"] >= 10 and parameters == undisturbed


@pytest.mark.slow
def test_a_lost_snapshot_agent_costs_nothing_and_a_killed_trainer_goes_on_from_memory(undisturbed, tmp_path):
    directory = tmp_path / "job"
    launcher = start_launch(directory, *OPTIONS)
    wait_protected(launcher, directory, 10)
    os.kill(child_processes(launcher)[1][1], signal.SIGKILL)
    wait_protected(launcher, directory, 20)  # the next one protects
    os.kill(child_processes(launcher)[0][1], signal.SIGKILL)
    (restore,), parameters = finish(launcher, directory)
    assert restore["level"] == "memory" and restore["step"] >= 20 and parameters == undisturbed
    events = read_rows(directory / "runs" / "run" / "keepers.jsonl")
    assert [event["event"] for event in events] == ["keeper-lost", "recovery"] and events[0]["host"] == 1


@pytest.mark.slow
def test_a_lost_node_of_a_ray_cluster_is_rebuilt_from_parity(undisturbed, tmp_path, monkeypatch):
    """Three nodes, each with a memory of its own; one with a trainer and a snapshot agent is lost, and its memory."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    directory, memory = tmp_path / "job", tempfile.TemporaryDirectory(dir="/dev/shm")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {
        name: cluster.add_node(num_cpus=1, env_vars={agent_files.MEMORY_VARIABLE: f"{memory.name}/{name}"})
        for name in ("a", "b", "c")
    }
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        launcher = start_launch(directory, *OPTIONS, "--engine", "ray")
        wait_until(lambda: sum(step >= 15 for step in protected_steps(memory.name).values()) == 2, process=launcher)
        (lost_slots,) = [slots for slots in protected_steps(memory.name) if slots.name == "host-1"]
        name = lost_slots.relative_to(memory.name).parts[0]
        raylet = psutil.Process(nodes[name].all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        shutil.rmtree(f"{memory.name}/{name}")
        cluster.remove_node(nodes[name], allow_graceful=False)
        (restore,), parameters = finish(launcher, directory)
    finally:
        cluster.shutdown()
        memory.cleanup()
    assert restore["level"] == "parity" and restore["step"] >= 15 and "host 1 lost" in restore["reason"]
    assert parameters == undisturbed


def protected_steps(memory):
    """Directory of each host's slots -> the step that its snapshot agent says is protected."""
    directories = [file.parent for file in Path(memory).glob("*/*/*/host-*/protected.json")]
    return {directory: agent_files.read_protected(directory).step for directory in directories}


FEWER = (
    "steps=120", "mesh.devices=4", "mesh.fsdp=4", "launch.hosts=4",
    "elastic={backoff: 2, hang_floor: 60, settle: 0.1, meshes: [{fsdp: 2}]}",
)  # fmt: skip


@pytest.mark.slow
def test_fewer_hosts_go_on_from_storage_and_protect_each_other_until_all_are_back(tmp_path):
    """Every process has a quarter of the state, which two processes cannot use: storage; the event log says why."""
    directory = tmp_path / "job"
    launcher = start_launch(directory, *OPTIONS, *FEWER, processes=4)
    slots = wait_protected(launcher, directory, 15, hosts=range(4))
    run = directory / "runs" / "run"
    lose(launcher, slots, [2])
    drain(run, [2])
    first = wait_restored(launcher, run, 1)
    wait_protected(launcher, directory, first["step"] + 2, hosts=[0, 1])
    drain(run, [2], undo=True)
    second = wait_restored(launcher, run, 2)
    wait_protected(launcher, directory, second["step"] + 2, hosts=range(4))
    finish_launch(launcher)
    assert (first["level"], second["level"]) == ("storage", "storage")
    assert "taken in slots [0, 1, 2, 3]; slots [0, 1] go on" in first["reason"] and "another mesh" in first["reason"]
    events = [event["event"] for event in events_of(run, "shrink", "grow", "unprotected")]
    assert events == ["shrink", "grow"] and not any(slot.exists() for slot in slots)


def wait_restored(launcher, run, count):
    """Restore number `count` of the run, once it has happened."""
    wait_until(lambda: len(events_of(run, "restore")) >= count, process=launcher)
    return events_of(run, "restore")[count - 1]
