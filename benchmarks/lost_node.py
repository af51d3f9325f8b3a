"""`meshwright bench lost-node`: a job on a Ray cluster of several nodes on this machine loses one, and ends as if not.

    pip install 'meshwright[ray]'
    meshwright bench lost-node elastic/demo

Each node has room for one process. A node that holds a trainer is killed with all that runs on it; no other is free, so
the run goes on with the first mesh of `elastic.meshes` that fits. Then a new node joins the cluster, and the run grows
back. The same configuration runs undisturbed on this machine alone (`--engine local`), and `audit` compares: parameters
and optimizer bit for bit, the samples, and the rules of the journals. It exits with 0 only if all promises were kept.
"""

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from meshwright.benchmarks.chaos import PATIENCE, Job, check_comparable, end_launcher, summary_table
from meshwright.configs.errors import MeshwrightError
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import NUMBER
from meshwright.train.launch.job import import_optional
from meshwright.train.report.run_audit import audit


def main(arguments: Sequence[str]) -> None:
    """Disturb, compare, print. Raises MeshwrightError where a promise was broken, or a run did not come back."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench lost-node", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="elastic/demo")
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value ...")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="enough to lose a node and get one back")
    options = parser.parse_args(arguments)
    check_comparable(options.config, options.overrides)
    import_optional("ray", "ray")
    name = f"lost-node-{int(time.time())}"
    job = Job(options.config, tuple(options.overrides), options.processes)
    disturbed(job, name, options.steps)
    job.run_to_end(f"{name}-alone", options.steps)
    directory = Path("runs") / name
    verdicts = audit(directory, against=Path("runs") / f"{name}-alone")
    print(summary_table(directory, {"a node lost": 1, "a node back": 1}, verdicts))
    if broken := [one.promise for one in verdicts if not one.passed]:
        raise MeshwrightError(f"{directory}: broken: {'; '.join(broken)}")


def disturbed(job: Job, name: str, steps: int) -> None:
    """The job on a cluster that loses a node and gets another. Raises MeshwrightError where it does not end well."""
    from ray.cluster_utils import Cluster

    with ExitStack() as stack:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(job.processes)]
        launcher = job.launch(name, steps, engine="ray", RAY_ADDRESS=cluster.address)
        stack.callback(end_launcher, launcher)
        events = Events(Path("runs") / name, launcher)
        events.wait("commit")
        lost = node_of(trainer(name, number=job.processes - 1), nodes)
        print(f"{time.strftime('%H:%M:%S')} a node is lost", flush=True)
        cluster.remove_node(lost, allow_graceful=False)
        events.wait("shrink")
        events.wait("commit", after="shrink")
        print(f"{time.strftime('%H:%M:%S')} a node joins", flush=True)
        cluster.add_node(num_cpus=1)
        events.wait("grow")
        if launcher.wait(timeout=PATIENCE) != 0:
            raise MeshwrightError(f"runs/{name} ended with exit code {launcher.returncode}; see runs/{name}.log")


class Events:
    """The journal of a run that somebody launched."""

    def __init__(self, directory: Path, launcher: subprocess.Popen) -> None:
        self._directory, self._launcher = directory, launcher

    def wait(self, kind: str, *, after: str | None = None) -> None:
        """Until an event of that kind has happened. Raises MeshwrightError where it does not."""
        deadline = time.monotonic() + PATIENCE
        while not self._happened(kind, after):
            if self._launcher.poll() is not None or time.monotonic() > deadline:
                raise MeshwrightError(f"{self._directory}: no {kind}; more --steps? see {self._directory}.log")
            time.sleep(0.1)

    def _happened(self, kind: str, after: str | None) -> bool:
        kinds = [event["event"] for event in read_events(self._directory)] if self._directory.exists() else []
        if after is not None:
            kinds = kinds[kinds.index(after) :]
        return kind in kinds


def trainer(name: str, *, number: int) -> psutil.Process:
    """Process `number` of the run called `name`, wherever the cluster has put it."""

    def is_it(process: psutil.Process) -> bool:
        return process.environ().get(NUMBER) == str(number) and f"name={name}" in process.cmdline()

    return first(psutil.process_iter(), is_it)


def node_of(process: psutil.Process, nodes: Sequence[Any]) -> Any:
    """The node of the cluster that a process runs on."""
    above = {parent.pid for parent in process.parents()}
    return first(nodes, lambda node: node.all_processes["raylet"][0].process.pid in above)


def first(candidates: Any, is_it: Callable[[Any], bool]) -> Any:
    """The first that is it. Raises MeshwrightError where none is."""
    for one in candidates:
        with suppress(psutil.Error):
            if is_it(one):
                return one
    raise MeshwrightError("the trainer that was to be lost with its node was not found")
