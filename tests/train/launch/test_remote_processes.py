"""The engine for many machines, with agents that are processes of this one: whatever is lost, the run ends as ever."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.fake_jobs import WORKER, last_states, make_run, restarts, when
from support.waiting import wait_until

from meshwright.configs.errors import MeshwrightError, Preemption, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig
from meshwright.train.launch import agent_server
from meshwright.train.launch.job import Job
from meshwright.train.launch.remote_processes import LostMachine, run_on_hosts

SETTINGS = {"backoff": 0.01, "hang_factor": 2.0, "hang_floor": 4.0, "start_timeout": 20.0, "grace": 10.0}
PROCESSES = 3
pytestmark = pytest.mark.usefixtures("idle_coordination_service")


class ProcessHosts:
    """Agents as processes of this machine, each of them a machine for the test."""

    name = "127.0.0.1"

    def __init__(self):
        self.agents, self.started, self.replaced = {}, [], []

    def start(self, machines, port):
        for slot in machines:
            command = [sys.executable, "-m", "meshwright.train.launch.agent", f"127.0.0.1:{port}", str(slot)]
            self.replaced += [self.agents[slot]] if slot in self.agents else []
            self.agents[slot] = subprocess.Popen(command)
            self.started.append(slot)

    def failure(self):
        return None

    def hint(self):
        return ""

    def discard(self, slot):
        if slot in self.agents:
            self.agents[slot].kill()
            self.agents[slot].wait()

    def close(self):
        for agent in self.agents.values():
            agent.wait(20)
        for agent in self.replaced:
            agent.poll()  # one that is frozen will be woken by its test


def run(directory, *faults, hosts=None, stop=None, **settings):
    hosts = hosts or ProcessHosts()
    command = [*WORKER, str(make_run(directory, *faults))]
    job = Job("run", command, PROCESSES, directory, ElasticConfig(**{**SETTINGS, **settings}), LaunchConfig())
    run_on_hosts(hosts, job, stop=stop or SimpleNamespace(requested=False))
    return hosts


def finished_alike(directory):
    """Whether all workers finished, in one state."""
    states = last_states(directory, PROCESSES)
    return len(states) == 1 and None not in states


def test_a_trainer_that_dies_is_started_again_under_the_same_agents(tmp_path):
    hosts = run(tmp_path / "run", (1, 1, "step", 5, "kill"))
    assert finished_alike(tmp_path / "run") and hosts.started == [0, 1, 2]
    assert [(event["suspect"], "{1: -9}" in event["reason"]) for event in restarts(tmp_path / "run")] == [(1, True)]
    assert [agent.returncode for agent in hosts.agents.values()] == [0, 0, 0]


def test_a_lost_machine_is_replaced_and_named(tmp_path):
    hosts, directory = ProcessHosts(), tmp_path / "run"
    when((directory / "met/1/5").exists, lambda: hosts.agents[2].kill())
    run(directory, hosts=hosts)
    assert finished_alike(directory) and hosts.started == [0, 1, 2, 2]
    (event,) = restarts(directory)
    assert event["suspect"] == 2 and "{2: lost with" in event["reason"]


def test_a_killed_agent_takes_its_trainer_along(tmp_path):
    """Nobody else would kill it: it waits for its peers for ever."""
    hosts, directory = ProcessHosts(), tmp_path / "run"
    when((directory / "met/1/5/1").exists, lambda: hosts.agents[1].kill())
    run(directory, (1, 1, "step", 6, "sleep"), hosts=hosts)
    pids = subprocess.run(["pgrep", "-f", f"worker.py {directory}"], capture_output=True, text=True, check=False)
    assert not pids.stdout.split()


def test_a_machine_that_freezes_is_lost_and_its_agent_ends_when_it_wakes(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_server, "AGENT_TIMEOUT", 2.0)
    hosts, directory, frozen = ProcessHosts(), tmp_path / "run", []
    hosts.discard = lambda slot: None  # nobody can reach it

    def freeze():
        frozen.append(hosts.agents[1])
        frozen[0].send_signal(signal.SIGSTOP)

    when((directory / "met/1/5").exists, freeze)
    run(directory, (1, 1, "step", 6, "stop"), hosts=hosts)
    assert finished_alike(directory) and restarts(directory)[0]["suspect"] == 1
    frozen[0].send_signal(signal.SIGCONT)
    frozen[0].send_signal(signal.SIGTERM)
    assert frozen[0].wait(20) in (0, 143, -15)


def test_a_preempted_machine_saves_first_and_is_no_failure(tmp_path):
    hosts, directory = ProcessHosts(), tmp_path / "run"
    when((directory / "met/1/5").exists, lambda: [agent.terminate() for agent in list(hosts.agents.values())])
    run(directory, hosts=hosts, restarts=0)
    assert finished_alike(directory) and sorted(hosts.started) == [0, 0, 1, 1, 2, 2]
    assert "[" not in restarts(directory)[0]["reason"] and "75" in restarts(directory)[0]["reason"]


def test_a_stop_request_saves_and_the_next_launch_goes_on(tmp_path):
    stop, directory = SimpleNamespace(requested=False), tmp_path / "run"
    when((directory / "met/1/5").exists, lambda: setattr(stop, "requested", True))
    with pytest.raises(Preemption):
        run(directory, stop=stop)
    run(directory)
    assert finished_alike(directory)


def test_a_refused_configuration_is_not_restarted(tmp_path):
    with pytest.raises(UserError, match="process 2 refused"):
        run(tmp_path / "run", (2, 1, "start", 0, "refuse"))


def test_machines_that_do_not_come_are_named(tmp_path):
    hosts = ProcessHosts()
    hosts.start = lambda machines, port: None
    with pytest.raises(
        MeshwrightError, match=r"no machine for processes \[0, 1, 2\] of 3: no agent connected within [12] s"
    ):
        run(tmp_path / "run", hosts=hosts, start_timeout=1)


def test_waiting_for_machines_ends_at_a_stop_request(tmp_path):
    hosts, stop = ProcessHosts(), SimpleNamespace(requested=False)
    hosts.start = lambda machines, port: setattr(stop, "requested", True)
    with pytest.raises(Preemption, match=r"processes \[0, 1, 2\] had no machine"):
        run(tmp_path / "run", hosts=hosts, stop=stop, start_timeout=5)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["node0:"]])
def test_an_agent_without_an_address_says_so(arguments):
    command = [sys.executable, "-m", "meshwright.train.launch.agent", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "HOST:PORT" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_slot_has_one_agent_at_a_time():
    def dial(slot):
        connection = agent_server.connect(f"127.0.0.1:{server.port}")
        connection.sendall(agent_server.encode_message({"hello": slot, "host": "here"}))
        return connection

    with agent_server.AgentServer(2) as server:
        first = dial(1)
        assert not server.wait_connected([1], 5)
        second, third = dial(1), dial(None)
        assert not server.wait_connected([0], 5) and server.connected_slots == {0, 1} and second.recv(1) == b""
        server.send(1, {"do": "start", "epoch": 4})
        assert server.started_trainer(1, epoch=4)
        first.close()
        wait_until(lambda: 1 not in server.connected_slots)
        fourth = dial(1)
        assert not server.wait_connected([1], 5)
        assert not server.started_trainer(1, epoch=4), "another agent, which started nothing"
        for connection in (second, third, fourth):
            connection.close()


def test_the_exit_code_of_a_lost_machine_names_it():
    assert LostMachine("node7") == -9 and repr({3: LostMachine("node7")}) == "{3: lost with node7}"
