"""Real trainers: one is killed in the middle, and the run ends with the undisturbed run's parameters."""

import contextlib
import os
import signal

import psutil
import pytest
from support.launched_run import child_processes, events_of, final_parameters, finish_launch, start_launch
from support.small_run import SMALL
from support.waiting import wait_until

from meshwright.train.core.jsonl import read_rows

OPTIONS = (
    *SMALL, "steps=60", "mesh={devices: 2, data: 2, fsdp: 1, tensor: 1}", "checkpoint={every: 10, keep: 99}",
    "elastic={backoff: 0.1, hang_floor: 20}", "name=run",
)  # fmt: skip


def start_and_wait_for_commit(directory, *options, **variables):
    launcher = start_launch(directory, *OPTIONS, *options, **variables)
    wait_until(lambda: events_of(directory / "runs" / "run", "commit"), process=launcher)
    return launcher


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "job"
    finish_launch(start_launch(directory, *OPTIONS))
    return final_parameters(directory / "runs" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_run_that_loses_a_trainer_ends_with_the_same_parameters_bit_for_bit(undisturbed, tmp_path, victim, how):
    directory = tmp_path / "job"
    run = directory / "runs" / "run"
    launcher = start_and_wait_for_commit(directory)
    os.kill(child_processes(launcher)[0][victim], how)
    finish_launch(launcher)
    assert final_parameters(run) == undisturbed
    events = events_of(run, "restart", "restore", "finish")
    assert [event["event"] for event in events] == ["restart", "restore", "finish"] and events[0]["suspect"] == victim
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row] == list(range(1, 61))


@pytest.mark.slow
def test_a_run_on_ray_that_loses_a_node_ends_with_the_same_parameters_bit_for_bit(undisturbed, tmp_path):
    """The command a user types, on a cluster of three nodes; one that holds a trainer is killed after a commit."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    directory = tmp_path / "job"
    run = directory / "runs" / "run"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    try:
        launcher = start_and_wait_for_commit(directory, "--engine", "ray", RAY_ADDRESS=cluster.address)
        parents = {parent.pid for parent in find_trainer(launcher).parents()}
        lost = next(node for node in nodes if node.all_processes["raylet"][0].process.pid in parents)
        cluster.remove_node(lost, allow_graceful=False)
        finish_launch(launcher)
    finally:
        cluster.shutdown()
    assert final_parameters(run) == undisturbed
    events = events_of(run, "restart", "restore", "finish")
    assert [event["event"] for event in events] == ["restart", "restore", "finish"]
    assert "lost with" in events[0]["reason"]


def find_trainer(launcher):
    """Process 1 of the run, wherever Ray has put it."""
    cache = psutil.Process(launcher.pid).environ()["MESHWRIGHT_CACHE"]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("MESHWRIGHT_PROCESS") == "1" and environment.get("MESHWRIGHT_CACHE") == cache:
                return process
    raise AssertionError("no trainer is there")
