"""The engine `ray` on a real cluster of several nodes on this machine: a node is lost, the run ends as ever."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig, RayConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.launch import local_processes
from meshwright.train.launch.job import Job
from meshwright.train.launch.ray_cluster import RayHosts
from meshwright.train.launch.remote_processes import run_on

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
WORKER = [sys.executable, str(Path(__file__).parents[2] / "support" / "fake_worker.py")]
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.xdist_group("ray"),
]


@pytest.fixture(scope="module")
def cluster():
    """A head without cores and three nodes of one."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    started.ours = [started.add_node(num_cpus=1) for _ in range(3)]
    yield started
    ray.shutdown()
    started.shutdown()


def node_of(cluster, group, number):
    """The node that a place of a placement group is on."""
    place = ray.util.placement_group_table(group)["bundles_to_node_id"][number]
    return next(node for node in cluster.ours if node.node_id == place)


def test_a_run_goes_through_the_loss_of_a_node(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(local_processes, "COORDINATOR_HOST", [sys.executable, "-c", "import time; time.sleep(600)"])
    (tmp_path / "config.yaml").write_text("{}")
    slow = {"process": "any", "epoch": 1, "point": "step", "step": "any", "kind": "slow"}
    (tmp_path / "faults.json").write_text(json.dumps([slow] * 3))
    elastic = ElasticConfig(backoff=0.01, hang_floor=20, start_timeout=60, grace=10)
    hosts = RayHosts(RayConfig(address=cluster.address), processes=2)
    lost = []

    def lose():
        while not (tmp_path / "met" / "1" / "5").exists():
            time.sleep(0.01)
        lost.append(node_of(cluster, hosts._group, 1))
        cluster.remove_node(lost[0], allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    job = Job("run", [*WORKER, str(tmp_path)], 2, tmp_path, elastic, LaunchConfig())
    run_on(hosts, job, stop=SimpleNamespace(asked=False))
    (told,) = [event for event in read_events(tmp_path) if event["event"] == "restart"]
    assert lost and told["suspect"] == 1 and "lost with" in told["reason"]
    last = [json.loads((tmp_path / f"worker-{n}.jsonl").read_text().splitlines()[-1]) for n in range(2)]
    assert [event["event"] for event in last] == ["finish"] * 2 and last[0]["state"] == last[1]["state"]


def test_a_cluster_without_room_is_told(cluster, tmp_path):
    hosts = RayHosts(RayConfig(address=cluster.address, cpus=64.0), processes=2)
    elastic = ElasticConfig(start_timeout=1)
    job = Job("run", ["true"], 2, tmp_path, elastic, LaunchConfig())
    with pytest.raises(MeshwrightError, match=r"no machine for processes \[0, 1\] of 2: .*2 x 64 CPU"):
        run_on(hosts, job, stop=SimpleNamespace(asked=False))


def test_no_cluster_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"launch.ray.address: 127.0.0.1:1: .*ray start --head"):
        RayHosts(RayConfig(address="127.0.0.1:1"), processes=1)
