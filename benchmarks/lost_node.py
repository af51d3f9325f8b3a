"""`meshwright bench lost-node`: a job on a Ray cluster of several nodes on this machine loses one and gets one back.

    pip install 'meshwright[ray]'
    meshwright bench lost-node elastic/demo

Each node holds one process. A node with a trainer is killed with all its processes; no other node is free, so the run
continues on the first mesh of `elastic.meshes` that fits. Then a new node joins the cluster, and the run grows back.
The same configuration runs undisturbed without the cluster (`--engine local`), and `audit` compares: parameters and
optimizer bit for bit, the samples, and the rules of the event logs. The exit code is 0 only if every promise was kept.
"""

import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from meshwright.benchmarks.chaos import TIMEOUT, Job, check_comparable, compare_runs, end_launcher
from meshwright.benchmarks.harness import bench_parser
from meshwright.configs.errors import MeshwrightError
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import NUMBER
from meshwright.train.launch.job import import_optional


def main(arguments: Sequence[str]) -> None:
    """Remove a node, compare, print. Raises MeshwrightError if a promise was broken, or if a run did not recover."""
    parser = bench_parser("lost-node", __doc__)
    parser.add_argument("config", nargs="?", default="elastic/demo")
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value ...")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="enough to lose a node and get one back")
    options = parser.parse_args(arguments)
    check_comparable(options.config, options.overrides)
    import_optional("ray", "ray")
    name = f"lost-node-{int(time.time())}"
    job = Job(options.config, tuple(options.overrides), options.processes)
    lose_node(job, name, options.steps)
    job.run_to_end(f"{name}-alone", options.steps)
    compare_runs(name, {"a node lost": 1, "a node back": 1})


def lose_node(job: Job, name: str, steps: int) -> None:
    """Run the job on a cluster that loses a node and gets another. Raises MeshwrightError if the run fails."""
    from ray.cluster_utils import Cluster

    with ExitStack() as stack:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(job.processes)]
        launcher = job.launch(name, steps, engine="ray", RAY_ADDRESS=cluster.address)
        stack.callback(end_launcher, launcher)
        wait = partial(wait_for_event, Path("runs") / name, launcher)
        wait("commit")
        victim = node_of(find_trainer(name, number=job.processes - 1), nodes)
        print(f"{time.strftime('%H:%M:%S')} a node is lost", flush=True)
        cluster.remove_node(victim, allow_graceful=False)
        wait("shrink")
        wait("commit", after="shrink")
        print(f"{time.strftime('%H:%M:%S')} a node joins", flush=True)
        cluster.add_node(num_cpus=1)
        wait("grow")
        if launcher.wait(timeout=TIMEOUT) != 0:
            raise MeshwrightError(f"runs/{name} ended with exit code {launcher.returncode}; see runs/{name}.log")


def wait_for_event(directory: Path, launcher: subprocess.Popen, kind: str, *, after: str | None = None) -> None:
    """Wait for an event of that kind. Raises MeshwrightError if the launcher ends, or after `TIMEOUT`."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        kinds = [event["event"] for event in read_events(directory)]
        if kind in (kinds if after is None else kinds[kinds.index(after) :]):
            return
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise MeshwrightError(f"{directory}: no event {kind}; try more --steps, and see {directory}.log")
        time.sleep(0.1)


def find_trainer(name: str, *, number: int) -> psutil.Process:
    """Process `number` of the run called `name`, on any node. Raises MeshwrightError if there is none."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(NUMBER) == str(number) and f"name={name}" in process.cmdline():
                return process
    raise MeshwrightError(f"runs/{name}: trainer {number} is not running; see runs/{name}.log")


def node_of(process: psutil.Process, nodes: Sequence[Any]) -> Any:
    """The node of the cluster on which a process runs."""
    parents = {parent.pid for parent in process.parents()}
    return next(node for node in nodes if node.all_processes["raylet"][0].process.pid in parents)
