"""A network that fails: it drops what is sent, one way or both, or resets connections."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.fake_jobs import WORKER, final_state, last_states, make_run, restarts, when
from support.hosts import Hosts
from support.partition import Partition
from support.small_run import SMALL
from support.waiting import wait_until

from meshwright.checkpoint.redundancy import agent_files
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig
from meshwright.parallel.transport.checked_stream import RequestClient
from meshwright.train.core.rendezvous import Server
from meshwright.train.launch import agent_server, local_processes, snapshot_agents
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_local
from meshwright.train.launch.local_processes import LocalEngine
from meshwright.train.launch.remote_processes import run_on_hosts
from meshwright.train.launch.supervisor import Supervisor

SETTINGS = {"backoff": 0.01, "hang_factor": 2.0, "hang_floor": 4.0, "start_timeout": 30.0, "grace": 10.0}

FAILURES = {
    "drops all": lambda network: network.cut(),
    "drops requests": lambda network: network.cut("forward"),
    "drops replies": lambda network: network.cut("back"),
    "resets": lambda network: network.reset(),
}


@pytest.fixture
def short_timeouts(monkeypatch):
    """No reply is waited for longer than a second."""
    monkeypatch.setitem(RequestClient.request.__kwdefaults__, "timeout", 0.5)
    monkeypatch.setattr(snapshot_agents, "REPLY_TIMEOUT", 1.0)


def protected(hosts):
    return [agent_files.read_protected(hosts.directory(host)).step for host in range(hosts.plan.hosts)]


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_an_unreachable_snapshot_agent_protects_nothing_new_and_loses_nothing_old(tmp_path, short_timeouts, fail):
    """Host 2 cannot be asked: what was protected stays so. Once it can, all is as before, and a lost one comes back."""
    with Hosts(tmp_path, hosts=3, max_lost_hosts=1) as hosts, Partition(hosts.servers[2].address) as network:
        hosts.servers[2] = network
        hosts.snapshot(1)
        hosts.protect()
        assert protected(hosts) == [1, 1, 1]
        fail(network)
        hosts.snapshot(2)
        hosts.protect()
        assert protected(hosts) == [1, 1, 1]
        assert all(network.address in hosts.agents[host].last_error for host in (0, 1))
        recovery = hosts.recover()  # the trainers start again meanwhile
        assert (recovery.step, recovery.rebuilt) == (-1, ()) and "host 2 " in recovery.note
        network.heal()
        hosts.protect()
        assert protected(hosts) == [2, 2, 2]
        before = hosts.files(0)
        hosts.lose(0)
        recovery = hosts.recover()
        rebuilt = hosts.files(0)["0.0"]
        assert (recovery.step, recovery.rebuilt) == (2, (0,)) and rebuilt == before["0.0"][: len(rebuilt)]


AGENT = """
import sys
from meshwright.train.launch import agent
agent.SUPERVISOR_TIMEOUT = 2.0
sys.exit(agent.main())
"""


class Machines:
    """Agents that stand for machines, that of slot 1 behind a network that can fail; nothing else reaches them."""

    name = "127.0.0.1"

    def __init__(self, directory):
        self.agents, self.network, self.directory = [], None, directory

    def start(self, machines, port):
        for slot in machines:
            address = f"127.0.0.1:{port}"
            if slot == 1 and self.network is None:
                self.network = Partition(address).__enter__()
                address = self.network.address
            self.agents.append(subprocess.Popen([sys.executable, "-c", AGENT, address, str(slot)]))

    def failure(self):
        return None

    def hint(self):
        return ""

    def discard(self, slot):
        pass

    def close(self):
        """Wait until no worker is left. Only its agent, which is not asked to, can kill the one that was cut off."""
        try:
            wait_until(lambda: not worker_pids(self.directory), seconds=60)
        finally:
            for agent in self.agents:
                agent.terminate()
            for agent in self.agents:
                agent.wait(20)
            self.network.__exit__()


def worker_pids(directory):
    pids = subprocess.run(["pgrep", "-f", f"worker.py {directory}"], capture_output=True, text=True, check=False)
    return pids.stdout.split()


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_an_unreachable_machine_is_replaced_and_its_agent_kills_its_trainer(
    tmp_path, idle_coordination_service, monkeypatch, fail
):
    """Its trainer waits for peers that are gone: only its agent can end it, and that hears nothing."""
    monkeypatch.setattr(agent_server, "AGENT_TIMEOUT", 2.0)
    directory = make_run(tmp_path / "run", (0, 1, "step", 6, "sleep"))
    machines = Machines(directory)
    when((directory / "met/1/6").exists, lambda: fail(machines.network))
    job = Job("run", [*WORKER, str(directory)], 2, directory, ElasticConfig(**SETTINGS), LaunchConfig())
    run_on_hosts(machines, job, stop=SimpleNamespace(requested=False))
    assert last_states(directory, 2) == {final_state()}
    events = restarts(directory)  # an agent that is heard and hears nothing may dial again, and be lost again
    assert events and all(event["suspect"] == 1 and "lost with" in event["reason"] for event in events)


@pytest.mark.parametrize(("fail", "count"), [("drops all", 1), ("drops replies", 1), ("resets", 0)])
def test_trainers_cut_off_from_the_launcher(tmp_path, idle_coordination_service, monkeypatch, fail, count):
    """Trainers that the launcher cannot hear are restarted; after a reset they dial again, and nothing is lost."""
    monkeypatch.setenv("WORKER_STEPS", "120")
    directory, settings = make_run(tmp_path / "run"), ElasticConfig(**{**SETTINGS, "hang_floor": 1.0})
    with Server() as server, Partition(server.address) as network:
        job = Job("run", [*WORKER, str(directory)], 2, directory, settings)
        engine = LocalEngine(job, rendezvous=network.address)
        when((directory / "met/1/30").exists, lambda: FAILURES[fail](network))
        when((directory / ("met/2" if count else "met/1/40")).exists, network.heal)
        Supervisor(engine, settings, directory, server.store, SimpleNamespace(requested=False)).run()
    assert last_states(directory, 2) == {final_state(120)} and len(restarts(directory)) == count


OPTIONS = (
    *SMALL,
    "steps=60",
    "mesh={devices: 2, data: 2, fsdp: 1, tensor: 1}",
    "checkpoint={every: 10, keep: 99}",
    "logging.ledger=true",
    "name=run",
)


@pytest.mark.slow
def test_trainers_cut_off_from_the_coordination_service(tmp_path, monkeypatch):
    """Real trainers, whose data goes from one to the other: a save needs the service, hangs, and is started again."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cut, directory = tmp_path / "cut", tmp_path / "runs" / "run"
    service = [sys.executable, str(Path(__file__).parents[1] / "support" / "partition.py"), str(cut)]
    monkeypatch.setattr(local_processes, "COORDINATION_SERVICE", service)
    when((directory / "checkpoints" / "10" / "manifest.json").exists, cut.touch)
    when(lambda: cut.exists() and int((directory / "epoch").read_text()) >= 2, cut.unlink)
    elastic = ElasticConfig(backoff=0.1, hang_floor=15, grace=10)
    command = [sys.executable, "-m", "meshwright.train.cli", "train", "quickstart", *OPTIONS]
    launch_local(Job("run", command, 2, directory, elastic, devices_per_process=1))
    (restart,) = restarts(directory)
    assert "no step for" in restart["reason"]
    audit = [sys.executable, "-m", "meshwright.train.cli", "audit", str(directory)]
    assert subprocess.run(audit, check=False, capture_output=True).returncode == 0
