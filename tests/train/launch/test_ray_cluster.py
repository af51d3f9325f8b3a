"""The engine `ray` on a real cluster of several nodes on this machine: a node is lost, the run ends as ever."""

from types import SimpleNamespace

import pytest
from support.fake_jobs import WORKER, final_state, last_states, make_run, restarts, when

from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig, RayConfig
from meshwright.train.launch.job import Job
from meshwright.train.launch.ray_cluster import RayHosts
from meshwright.train.launch.remote_processes import run_on_hosts

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
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
    started.worker_nodes = [started.add_node(num_cpus=1) for _ in range(3)]
    yield started
    ray.shutdown()
    started.shutdown()


def node_of(cluster, group, bundle):
    """The node that a bundle of a placement group is on."""
    node_id = ray.util.placement_group_table(group)["bundles_to_node_id"][bundle]
    return next(node for node in cluster.worker_nodes if node.node_id == node_id)


def test_a_run_survives_the_loss_of_a_node(cluster, tmp_path, idle_coordination_service):
    make_run(tmp_path, *[("any", 1, "step", "any", "slow")] * 3)
    elastic = ElasticConfig(backoff=0.01, hang_floor=20, start_timeout=60, grace=10)
    hosts = RayHosts(RayConfig(address=cluster.address), processes=2)
    lost = []

    def lose_node():
        lost.append(node_of(cluster, hosts.placement_group, 1))
        cluster.remove_node(lost[0], allow_graceful=False)

    when((tmp_path / "met" / "1" / "5").exists, lose_node)
    job = Job("run", [*WORKER, str(tmp_path)], 2, tmp_path, elastic, LaunchConfig())
    run_on_hosts(hosts, job, stop=SimpleNamespace(requested=False))
    (restart,) = restarts(tmp_path)
    assert lost and restart["suspect"] == 1 and "lost with" in restart["reason"]
    assert last_states(tmp_path, 2) == {final_state()}


def test_a_cluster_with_too_few_resources_is_an_error_that_names_them(cluster, tmp_path):
    hosts = RayHosts(RayConfig(address=cluster.address, cpus=64.0), processes=2)
    elastic = ElasticConfig(start_timeout=1)
    job = Job("run", ["true"], 2, tmp_path, elastic, LaunchConfig())
    with pytest.raises(MeshwrightError, match=r"no machine for processes \[0, 1\] of 2: .*2 x 64 CPU"):
        run_on_hosts(hosts, job, stop=SimpleNamespace(requested=False))


def test_a_missing_cluster_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"launch.ray.address: 127.0.0.1:1: .*ray start --head"):
        RayHosts(RayConfig(address="127.0.0.1:1"), processes=1)
