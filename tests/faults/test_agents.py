"""Real trainers under agents: `meshwright launch --engine agents`, and an agent for each machine."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from support.launched_run import events_of, final_parameters, start_launch
from support.small_run import SMALL
from support.waiting import HANG_SECONDS, wait_until

from meshwright.checkpoint.redundancy import agent_files
from meshwright.train.core.jsonl import read_rows
from meshwright.train.launch.local_processes import free_port

OPTIONS = (*SMALL, "name=run")
TWO = ("steps=60", "mesh={devices: 2, data: 1, fsdp: 2, tensor: 1}", "elastic={backoff: 0.1, hang_floor: 30}")
STORAGE, PARITY = "checkpoint={every: 10, keep: 99}", "checkpoint={every: 10, keep: 99, memory_every: 1, parity: xor}"
FOUR = (
    "steps=160", "mesh={devices: 4, data: 4, fsdp: 1, tensor: 1}", "microbatches=4",
    "elastic={backoff: 0.1, hang_floor: 60, meshes: [{data: 2}], deterministic: true, replace: 3, settle: 1}",
    "checkpoint={every: 50, keep: 99, memory_every: 1, parity: xor}", "logging.ledger=true",
)  # fmt: skip


class Machines:
    """A launcher, and agents that stand for machines. `with Machines(path, 2, "steps=60") as machines: ...`."""

    def __init__(self, directory, processes, *options):
        self.directory, self.processes, self.options = directory, processes, (*OPTIONS, *options)
        self.run, self.log = directory / "runs" / "run", directory / "launch.log"
        self.agents = {}
        directory.mkdir(exist_ok=True)

    def __enter__(self):
        self.launch()
        for number in range(self.processes):
            self.join(number)
        return self

    def __exit__(self, *_):
        for number in list(self.agents):
            self.lose(number)
        if self.launcher.poll() is None:
            self.launcher.kill()
        self.launcher.wait()

    def launch(self):
        self.address = f"127.0.0.1:{free_port()}"
        options = [*self.options, "--engine", "agents", f"launch.listen={self.address}"]
        with self.log.open("ab") as log:
            self.launcher = start_launch(self.directory, *options, processes=self.processes, stderr=log)

    def join(self, number, *, slot=()):
        """Start an agent, as a person does on a machine; `slot`: as an argument, where it is to have a certain one."""
        command = [sys.executable, "-m", "meshwright.train.launch.agent", self.address, *slot]
        environment = os.environ | {"MESHWRIGHT_CACHE": str(self.directory.parent / "cache"), "XLA_FLAGS": ""}
        self.agents[number] = subprocess.Popen(command, cwd=self.directory, env=environment)

    def lose(self, number):
        """Kill an agent and all it started: trainer, snapshot agent."""
        agent = self.agents.pop(number)
        children = psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []
        for process in [agent, *children]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        agent.wait()

    def lose_with_memory(self, number):
        """Lose a machine and its snapshots; the number of its host."""
        host = self.host_of(number)
        self.lose(number)
        shutil.rmtree(self.memory(host))
        return host

    def host_of(self, number):
        """The slot, and so the host, that an agent serves."""
        for child in psutil.Process(self.agents[number].pid).children():
            if slot := child.environ().get("MESHWRIGHT_SLOT"):
                return int(slot)
        raise AssertionError(f"agent {number} has no trainer")

    def child_pid(self, number, module):
        """The process id of what an agent started: the child that runs `module`."""
        children = psutil.Process(self.agents[number].pid).children()
        return next(child.pid for child in children if module in child.cmdline())

    def memory(self, host):
        return agent_files.memory_directory(self.run, host=host)

    def wait_until(self, condition, failure):
        wait_until(condition, process=self.launcher, explain=lambda: f"{failure}\n{self.log.read_text()[-3000:]}")

    def wait_protected(self, step, *, hosts):
        self.wait_until(
            lambda: min(agent_files.read_protected(self.memory(host)).step for host in hosts) >= step,
            f"step {step} was never protected on {hosts}",
        )

    def events(self, *kinds):
        return events_of(self.run, *kinds)

    def finish(self):
        """The parameters of a run that ended well, and its agents with it."""
        assert self.launcher.wait(HANG_SECONDS) == 0, self.log.read_text()[-3000:]
        assert [agent.wait(20) for agent in self.agents.values()] == [0] * len(self.agents)
        return final_parameters(self.run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with Machines(tmp_path_factory.mktemp("undisturbed") / "job", 2, *TWO, STORAGE) as two:
        return two.finish()


@pytest.mark.slow
def test_a_stopped_launch_goes_on_when_the_same_commands_are_typed_again(undisturbed, tmp_path):
    """The launcher says what to run on the machines; it is asked to stop; typed again, it goes on to the same end."""
    with Machines(tmp_path / "job", 2, *TWO, STORAGE) as machines:
        machines.wait_until(lambda: machines.events("commit"), "no commit")
        machines.launcher.send_signal(signal.SIGTERM)
        assert machines.launcher.wait(HANG_SECONDS) == 75
        assert [agent.wait(20) for agent in machines.agents.values()] == [0, 0]
        assert f"meshwright.train.launch.agent {machines.address}" in machines.log.read_text()
        machines.launch()
        for number in range(2):
            machines.join(number)
        assert machines.finish() == undisturbed
        assert machines.events("restart") == [] and len(machines.events("restore")) == 1


@pytest.mark.slow
def test_a_lost_machine_is_rebuilt_from_parity(undisturbed, tmp_path):
    with Machines(tmp_path / "job", 2, *TWO, PARITY) as machines:
        machines.wait_protected(15, hosts=[0, 1])
        lost = machines.lose_with_memory(1)
        machines.join(1)
        assert machines.finish() == undisturbed
        (restore,) = machines.events("restore")
        assert restore["level"] == "parity" and restore["step"] >= 15 and f"host {lost} lost" in restore["reason"]
        assert not any(machines.memory(host).exists() for host in (0, 1))


@pytest.mark.slow
def test_a_snapshot_agent_outlives_trainers_and_is_replaced_when_it_dies(undisturbed, tmp_path):
    agent_module = "meshwright.train.launch.snapshot_agent_main"
    with Machines(tmp_path / "job", 2, *TWO, PARITY) as machines:
        machines.wait_protected(5, hosts=[0, 1])
        agents = [machines.child_pid(number, agent_module) for number in (0, 1)]
        os.kill(machines.child_pid(0, "meshwright.train.cli"), signal.SIGKILL)
        machines.wait_until(lambda: len(machines.events("restore")) == 1, "no restore")
        assert [machines.child_pid(number, agent_module) for number in (0, 1)] == agents
        os.kill(agents[1], signal.SIGKILL)
        machines.wait_protected(agent_files.read_protected(machines.memory(0)).step + 5, hosts=[0, 1])
        assert machines.finish() == undisturbed
        assert [event["level"] for event in machines.events("restore")] == ["memory"]
        events = [event["event"] for event in read_rows(machines.run / "keepers.jsonl")]
        assert events == ["recovery", "keeper-lost"]


@pytest.mark.slow
def test_fewer_machines_protect_each_other_and_then_all_of_them_again(tmp_path):
    """One of four is lost for good: two go on. It comes back, is drained and returned; another is lost: parity."""
    with Machines(tmp_path / "whole", 4, *FOUR) as machines:
        undisturbed = machines.finish()
    with Machines(tmp_path / "job", 4, *FOUR) as machines:
        machines.wait_protected(10, hosts=range(4))
        lost = machines.lose_with_memory(3)
        machines.wait_until(lambda: machines.events("shrink"), "no shrink")
        (shrink,) = machines.events("shrink")
        machines.wait_until(lambda: len(machines.events("restore")) == 1, "no restore")
        began = machines.events("restore")[0]["step"]
        machines.wait_protected(began + 5, hosts=shrink["slots"])
        machines.join(3, slot=[str(lost)])
        machines.wait_until(lambda: machines.events("grow"), "no grow")
        machines.wait_until(lambda: len(machines.events("restore")) == 2, "no restore")
        machines.wait_protected(machines.events("restore")[1]["step"] + 5, hosts=range(4))
        machines.lose_with_memory(1)
        machines.join(1)
        assert machines.finish() == undisturbed
        levels = [event["level"] for event in machines.events("restore")]
        assert levels == ["memory", "storage", "parity"]
        audit = [sys.executable, "-m", "meshwright.train.cli", "audit", str(machines.run)]
        assert subprocess.run(audit, check=False, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_machine_is_drained_and_put_back(tmp_path):
    with Machines(tmp_path / "job", 4, *FOUR, "checkpoint.parity=none", "checkpoint.memory_every=0") as machines:
        drain = [sys.executable, "-m", "meshwright.train.cli", "drain", str(machines.run), "2"]
        machines.wait_until(lambda: (machines.run / "metrics.jsonl").exists(), "no step")
        subprocess.run(drain, check=True, stdout=subprocess.DEVNULL)
        machines.wait_until(lambda: machines.events("shrink"), "no shrink")
        assert 2 not in machines.events("shrink")[0]["slots"]
        machines.wait_until(lambda: len(machines.events("restore")) == 1, "no restore")
        subprocess.run([*drain, "--undo"], check=True, stdout=subprocess.DEVNULL)
        machines.wait_until(lambda: machines.events("grow"), "no grow")
        machines.finish()
        assert machines.events("restart") == []
