"""A network that fails: it swallows what is sent, one way or both, or resets connections; and what comes of it."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.hosts import Hosts
from support.partition import Partition
from support.small_run import SMALL

from meshwright.checkpoint.redundancy import agent_files
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig
from meshwright.parallel.transport.checked_stream import RequestClient
from meshwright.train.core.event_log import read_events
from meshwright.train.core.rendezvous import Server
from meshwright.train.launch import agent_server, local_processes, snapshot_agents
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_local
from meshwright.train.launch.local_processes import LocalEngine
from meshwright.train.launch.remote_processes import run_on_hosts
from meshwright.train.launch.supervisor import supervise

WORKER = [sys.executable, str(Path(__file__).parents[1] / "support" / "fake_worker.py")]
SETTINGS = {"backoff": 0.01, "hang_factor": 2.0, "hang_floor": 4.0, "start_timeout": 30.0, "grace": 10.0}

FAILURES = {
    "swallows": lambda between: between.cut(),
    "swallows questions": lambda between: between.cut("there"),
    "swallows answers": lambda between: between.cut("back"),
    "resets": lambda between: between.reset(),
}


@pytest.fixture
def hasty(monkeypatch):
    """Nobody is waited for longer than half a second."""
    monkeypatch.setitem(RequestClient.request.__kwdefaults__, "timeout", 0.5)
    monkeypatch.setattr(snapshot_agents, "REACH", 1.0)


def protected(hosts):
    return [agent_files.read_protected(hosts.directory(host)).step for host in range(hosts.plan.hosts)]


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_keeper_out_of_reach_protects_nothing_new_and_costs_nothing_old(tmp_path, hasty, fail):
    """Host 2 cannot be asked: what was protected stays so. Once it can, all is as before, and a lost one comes back."""
    with Hosts(tmp_path, hosts=3, losses=1) as hosts, Partition(hosts.listeners[2].address) as between:
        hosts.listeners[2] = between
        hosts.snapshot(1)
        hosts.protect()
        assert protected(hosts) == [1, 1, 1]
        fail(between)
        hosts.snapshot(2)
        began = time.monotonic()
        hosts.protect()
        assert protected(hosts) == [1, 1, 1] and time.monotonic() - began < 20
        assert all(between.address in hosts.keepers[host].trouble for host in (0, 1))
        word = hosts.recover()  # the trainers start again meanwhile
        assert (word.step, word.rebuilt) == (-1, ()) and "host 2 has no keeper" in word.note
        between.heal()
        hosts.protect()
        assert protected(hosts) == [2, 2, 2]
        before = hosts.files(0)
        hosts.lose(0)
        word = hosts.recover()
        found = hosts.files(0)["0.0"]
        assert (word.step, word.rebuilt) == (2, (0,)) and found == before["0.0"][: len(found)]


@pytest.fixture
def coordination(monkeypatch):
    """No worker here speaks JAX."""
    monkeypatch.setattr(local_processes, "COORDINATOR_HOST", [sys.executable, "-c", "import time; time.sleep(600)"])


def prepared(directory, *faults):
    directory.mkdir()
    (directory / "config.yaml").write_text("{}")
    (directory / "faults.json").write_text(json.dumps(faults))
    return directory


def when(file, act):
    """`act` in a thread, once `file` is there."""

    def wait():
        while not file.exists():
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def ended_as_ever(directory, processes, *, steps=12):
    state = "seed"
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    lines = [(directory / f"worker-{number}.jsonl").read_text().splitlines() for number in range(processes)]
    return {json.loads(told[-1]).get("state") for told in lines} == {state}


def restarts(directory):
    return [event for event in read_events(directory) if event["event"] == "restart"]


AGENT = """
import sys
from meshwright.train.launch import agent
agent.SILENCE = 2.0
sys.exit(agent.main())
"""


class Machines:
    """Agents that are machines, number 1 behind a network that can fail; the launcher cannot reach them otherwise."""

    name = "127.0.0.1"

    def __init__(self, directory):
        self.agents, self.between, self.left, self._directory = [], None, [], directory

    def start(self, places, port):
        for number in places:
            address = f"127.0.0.1:{port}"
            if number == 1 and self.between is None:
                self.between = Partition(address).__enter__()
                address = self.between.address
            self.agents.append(subprocess.Popen([sys.executable, "-c", AGENT, address, str(number)]))

    def trouble(self):
        return None

    def hint(self):
        return ""

    def discard(self, number):
        pass

    def close(self):
        """The run is over: what is left is the trainer that only its agent can reach."""
        deadline = time.monotonic() + 5
        while (left := workers(self._directory)) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.left = left
        for agent in self.agents:
            agent.terminate()
        for agent in self.agents:
            agent.wait(20)
        self.between.__exit__()


def workers(directory):
    found = subprocess.run(["pgrep", "-f", f"worker.py {directory}"], capture_output=True, text=True, check=False)
    return found.stdout.split()


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_machine_that_cannot_be_reached_is_replaced_and_kills_its_trainer(tmp_path, coordination, monkeypatch, fail):
    """Its trainer waits for peers that are no more: nobody but its agent can end it, and that hears nothing."""
    monkeypatch.setattr(agent_server, "LOST", 2.0)
    directory = prepared(tmp_path / "run", {"process": 0, "epoch": 1, "point": "step", "step": 6, "kind": "sleep"})
    machines = Machines(directory)
    when(directory / "met/1/6", lambda: fail(machines.between))
    job = Job("run", [*WORKER, str(directory)], 2, directory, ElasticConfig(**SETTINGS), LaunchConfig())
    run_on_hosts(machines, job, stop=SimpleNamespace(asked=False))
    assert ended_as_ever(directory, 2) and not machines.left
    told = restarts(directory)  # one that is heard and hears nothing may dial again, and be lost again
    assert told and all(one["suspect"] == 1 and "lost with" in one["reason"] for one in told)


@pytest.mark.parametrize(("fail", "again"), [("swallows", 1), ("swallows answers", 1), ("resets", 0)])
def test_trainers_cut_off_from_the_launcher(tmp_path, coordination, monkeypatch, fail, again):
    """They are heard of no more, and started again; a connection that is reset is dialled anew, and nothing is lost."""
    monkeypatch.setenv("WORKER_STEPS", "120")
    directory, settings = prepared(tmp_path / "run"), ElasticConfig(**{**SETTINGS, "hang_floor": 1.0})
    with Server() as server, Partition(server.address) as between:
        engine = LocalEngine([*WORKER, str(directory)], processes=2, rendezvous=between.address)
        when(directory / "met/1/30", lambda: FAILURES[fail](between))
        when(directory / ("met/2" if again else "met/1/40"), between.heal)
        supervise(engine, settings=settings, directory=directory, room=server.store, stop=SimpleNamespace(asked=False))
    assert ended_as_ever(directory, 2, steps=120) and len(restarts(directory)) == again


WORDS = (
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
    monkeypatch.setattr(local_processes, "COORDINATOR_HOST", service)
    when(
        directory / "checkpoints" / "10" / "manifest.json", lambda: (cut.touch(), when(Epoch(directory, 2), cut.unlink))
    )
    elastic = ElasticConfig(backoff=0.1, hang_floor=15, grace=10)
    command = [sys.executable, "-m", "meshwright.train.cli", "train", "quickstart", *WORDS]
    launch_local(Job("run", command, 2, directory, elastic, devices_per_process=1))
    (told,) = restarts(directory)
    assert "no step for" in told["reason"]
    audit = [sys.executable, "-m", "meshwright.train.cli", "audit", str(directory)]
    assert subprocess.run(audit, check=False, capture_output=True).returncode == 0


class Epoch:
    """Whether the run has come to an epoch."""

    def __init__(self, directory, number):
        self._file, self._number = directory / "epoch", number

    def exists(self):
        return int(self._file.read_text()) >= self._number
