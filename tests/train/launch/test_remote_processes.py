"""The engine for many machines, with agents that are processes of this one: whatever is lost, the run ends as ever."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshwright.configs.errors import MeshwrightError, Preempted, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.launch import agent_server, local_processes
from meshwright.train.launch.job import Job
from meshwright.train.launch.remote_processes import Lost, run_on

WORKER = [sys.executable, str(Path(__file__).parents[2] / "support" / "fake_worker.py")]
SETTINGS = {"backoff": 0.01, "hang_factor": 2.0, "hang_floor": 4.0, "start_timeout": 20.0, "grace": 10.0}


@pytest.fixture(autouse=True)
def coordination(monkeypatch):
    """No worker here speaks JAX."""
    monkeypatch.setattr(local_processes, "COORDINATOR_HOST", [sys.executable, "-c", "import time; time.sleep(600)"])


class ProcessHosts:
    """Agents as processes of this machine, each of them a machine for the test."""

    name = "127.0.0.1"

    def __init__(self):
        self.agents, self.started, self.replaced = {}, [], []

    def start(self, places, port):
        for number in places:
            command = [sys.executable, "-m", "meshwright.train.launch.agent", f"127.0.0.1:{port}", str(number)]
            self.replaced += [self.agents[number]] if number in self.agents else []
            self.agents[number] = subprocess.Popen(command)
            self.started.append(number)

    def trouble(self):
        return None

    def hint(self):
        return ""

    def discard(self, number):
        if number in self.agents:
            self.agents[number].kill()
            self.agents[number].wait()

    def close(self):
        for agent in self.agents.values():
            agent.wait(20)
        for agent in self.replaced:
            agent.poll()  # one that is frozen will be woken by its test


def job(directory, *faults, processes=3, **settings):
    keys = ("process", "epoch", "point", "step", "kind")
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text("{}")
    (directory / "faults.json").write_text(json.dumps([dict(zip(keys, one, strict=True)) for one in faults]))
    elastic = ElasticConfig(**{**SETTINGS, **settings})
    return Job("run", [*WORKER, str(directory)], processes, directory, elastic, LaunchConfig())


def run(directory, *faults, hosts=None, stop=None, **settings):
    hosts = hosts or ProcessHosts()
    run_on(hosts, job(directory, *faults, **settings), stop=stop or SimpleNamespace(asked=False))
    return hosts


def finished(directory):
    """The last state each worker told."""
    lines = [(directory / f"worker-{number}.jsonl").read_text().splitlines() for number in range(3)]
    return {json.loads(told[-1])["state"] for told in lines}


def restarts(directory):
    return [event for event in read_events(directory) if event["event"] == "restart"]


def when(condition, act):
    """`act` in a thread, once `condition` holds."""

    def wait():
        while not condition():
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_a_trainer_that_dies_is_started_again_under_the_same_agents(tmp_path):
    hosts = run(tmp_path / "run", (1, 1, "step", 5, "kill"))
    assert len(finished(tmp_path / "run")) == 1 and hosts.started == [0, 1, 2]
    assert [(event["suspect"], "{1: -9}" in event["reason"]) for event in restarts(tmp_path / "run")] == [(1, True)]
    assert [agent.returncode for agent in hosts.agents.values()] == [0, 0, 0]


def test_a_machine_that_is_lost_is_replaced_and_named(tmp_path):
    hosts, directory = ProcessHosts(), tmp_path / "run"
    when((directory / "met/1/5").exists, lambda: hosts.agents[2].kill())
    run(directory, hosts=hosts)
    assert len(finished(directory)) == 1 and hosts.started == [0, 1, 2, 2]
    (told,) = restarts(directory)
    assert told["suspect"] == 2 and "{2: lost with" in told["reason"]


def test_an_agent_that_is_killed_takes_its_trainer_along(tmp_path):
    """Nobody else would kill it: it waits for its peers for ever."""
    hosts, directory = ProcessHosts(), tmp_path / "run"
    when((directory / "met/1/5/1").exists, lambda: hosts.agents[1].kill())
    run(directory, (1, 1, "step", 6, "sleep"), hosts=hosts)
    pids = subprocess.run(["pgrep", "-f", f"worker.py {directory}"], capture_output=True, text=True, check=False)
    assert not pids.stdout.split()


def test_a_machine_that_freezes_is_lost_and_its_agent_ends_when_it_wakes(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_server, "LOST", 2.0)
    hosts, directory, frozen = ProcessHosts(), tmp_path / "run", []
    hosts.discard = lambda number: None  # nobody can reach it

    def freeze():
        frozen.append(hosts.agents[1])
        frozen[0].send_signal(signal.SIGSTOP)

    when((directory / "met/1/5").exists, freeze)
    run(directory, (1, 1, "step", 6, "stop"), hosts=hosts)
    assert len(finished(directory)) == 1 and restarts(directory)[0]["suspect"] == 1
    frozen[0].send_signal(signal.SIGCONT)
    frozen[0].send_signal(signal.SIGTERM)
    assert frozen[0].wait(20) in (0, 143, -15)


def test_a_machine_taken_away_saves_first_and_counts_as_no_failure(tmp_path):
    hosts, directory = ProcessHosts(), tmp_path / "run"
    when((directory / "met/1/5").exists, lambda: [agent.terminate() for agent in list(hosts.agents.values())])
    run(directory, hosts=hosts, restarts=0)
    assert len(finished(directory)) == 1 and sorted(hosts.started) == [0, 0, 1, 1, 2, 2]
    assert "[" not in restarts(directory)[0]["reason"] and "75" in restarts(directory)[0]["reason"]


def test_asked_to_stop_it_saves_and_the_next_launch_goes_on(tmp_path):
    stop, directory = SimpleNamespace(asked=False), tmp_path / "run"
    when((directory / "met/1/5").exists, lambda: setattr(stop, "asked", True))
    with pytest.raises(Preempted):
        run(directory, stop=stop)
    run(directory)
    assert len(finished(directory)) == 1


def test_what_no_restart_would_mend_is_not_restarted(tmp_path):
    with pytest.raises(UserError, match="process 2 refused"):
        run(tmp_path / "run", (2, 1, "start", 0, "refuse"))


def test_machines_that_do_not_come_are_named(tmp_path):
    hosts = ProcessHosts()
    hosts.start = lambda places, port: None
    with pytest.raises(
        MeshwrightError, match=r"no machine for processes \[0, 1, 2\] of 3: no word from them for [12] s"
    ):
        run(tmp_path / "run", hosts=hosts, start_timeout=1)


def test_who_waits_for_machines_stops_when_asked(tmp_path):
    hosts, stop = ProcessHosts(), SimpleNamespace(asked=False)
    hosts.start = lambda places, port: setattr(stop, "asked", True)
    with pytest.raises(Preempted, match=r"processes \[0, 1, 2\] had no machine"):
        run(tmp_path / "run", hosts=hosts, stop=stop, start_timeout=5)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["node0:"]])
def test_an_agent_without_an_address_says_so(words):
    done = subprocess.run(
        [sys.executable, "-m", "meshwright.train.launch.agent", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "is no HOST:PORT" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_number_that_is_taken_is_not_given_twice():
    with agent_server.Switchboard(2) as board:
        lines = [agent_server.connected(f"127.0.0.1:{board.port}") for _ in range(3)]
        for line, wanted in zip(lines, (1, 1, None), strict=True):
            line.sendall(json.dumps({"hello": wanted, "host": "here"}).encode() + b"\n")
            board.wait([wanted or 0], 5)
        assert board.present == {0, 1} and lines[1].recv(1) == b""
        board.tell(1, {"do": "start", "epoch": 4})
        assert board.serves(1, epoch=4)
        lines[0].close()
        while 1 in board.present:
            time.sleep(0.01)
        lines.append(agent_server.connected(f"127.0.0.1:{board.port}"))
        lines[-1].sendall(b'{"hello": 1, "host": "there"}\n')
        assert not board.wait([1], 5) and not board.serves(1, epoch=4), "another agent, which started nothing"
        for line in lines:
            line.close()
    assert Lost("node7") == -9 and repr({3: Lost("node7")}) == "{3: lost with node7}"
