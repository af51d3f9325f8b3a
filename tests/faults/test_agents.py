"""Real trainers under agents, as on machines of one's own: `meshwright launch --engine agents`, an agent a machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from support.small_run import SMALL
from support.waiting import HANG_SECONDS, wait_until

from meshwright.checkpoint import manifest
from meshwright.checkpoint.redundancy import agent_files
from meshwright.train.core.event_log import read_events

WORDS = (*SMALL, "name=run")
TWO = ("steps=60", "mesh={devices: 2, data: 1, fsdp: 2, tensor: 1}", "elastic={backoff: 0.1, hang_floor: 30}")
KEPT = ("checkpoint={every: 10, keep: 99, memory_every: 1, parity: xor}",)
FOUR = (
    "steps=160", "mesh={devices: 4, data: 4, fsdp: 1, tensor: 1}", "microbatches=4",
    "elastic={backoff: 0.1, hang_floor: 60, meshes: [{data: 2}], deterministic: true, replace: 3, settle: 1}",
    "checkpoint={every: 50, keep: 99, memory_every: 1, parity: xor}", "logging.ledger=true",
)  # fmt: skip


class Machines:
    """A launcher, and agents that are machines for the test. `with Machines(path, 2, "steps=60") as machines: ...`."""

    def __init__(self, directory, processes, *changes):
        self.directory, self.processes, self.changes = directory, processes, (*WORDS, *changes)
        self.run = directory / "runs" / "run"
        self.environment = os.environ | {"MESHWRIGHT_CACHE": str(directory.parent / "cache"), "XLA_FLAGS": ""}
        self.agents, self.said = {}, directory / "said"
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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *self.changes]
        command += ["--engine", "agents", "--processes", str(self.processes), "--devices-per-process", "1"]
        with self.said.open("ab") as said:
            self.launcher = subprocess.Popen(
                [*command, f"launch.listen={self.address}"],
                cwd=self.directory, env=self.environment, stdout=subprocess.DEVNULL, stderr=said,
            )  # fmt: skip

    def join(self, number, *, said=()):
        """What a person types on a machine; `said`: the number, where it is to have a certain one."""
        command = [sys.executable, "-m", "meshwright.train.launch.agent", self.address, *said]
        self.agents[number] = subprocess.Popen(command, cwd=self.directory, env=self.environment)

    def lose(self, number):
        """A machine is gone: agent, trainer, keeper."""
        agent = self.agents.pop(number)
        with_it = psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []
        for process in [agent, *with_it]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        agent.wait()

    def host_of(self, number):
        """The number of the process that an agent was given."""
        for child in psutil.Process(self.agents[number].pid).children():
            told = child.environ()
            if "MESHWRIGHT_SLOT" in told:
                return int(told["MESHWRIGHT_SLOT"])
        raise AssertionError(f"agent {number} has no trainer")

    def memory(self, host):
        return agent_files.memory_directory(self.run, host=host)

    def wait_until(self, condition, failure):
        wait_until(condition, process=self.launcher, explain=lambda: f"{failure}\n{self.said.read_text()[-3000:]}")

    def wait_protected(self, step, *, hosts):
        self.wait_until(
            lambda: min(agent_files.read_protected(self.memory(host)).step for host in hosts) >= step,
            f"step {step} was never protected on {hosts}",
        )

    def events(self, *kinds):
        return [event for event in read_events(self.run) if event["event"] in kinds] if self.run.exists() else []

    def finished(self):
        """The parameters of a run that ended well, and its agents with it."""
        assert self.launcher.wait(HANG_SECONDS) == 0, self.said.read_text()[-3000:]
        assert [agent.wait(20) for agent in self.agents.values()] == [0] * len(self.agents)
        last = max((self.run / "checkpoints").glob("[0-9]*"), key=lambda one: int(one.name))
        return {name: one.blocks for name, one in manifest.read(last).arrays.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with Machines(tmp_path_factory.mktemp("undisturbed") / "job", 2, *TWO, "checkpoint={every: 10, keep: 99}") as two:
        return two.finished()


@pytest.mark.slow
def test_two_terminals_sigterm_and_the_same_command_again(undisturbed, tmp_path):
    """The launcher says what to run on the machines; it is asked to stop; typed again, it goes on to the same end."""
    with Machines(tmp_path / "job", 2, *TWO, "checkpoint={every: 10, keep: 99}") as machines:
        machines.wait_until(lambda: machines.events("commit"), "no commit")
        machines.launcher.send_signal(signal.SIGTERM)
        assert machines.launcher.wait(HANG_SECONDS) == 75
        assert [agent.wait(20) for agent in machines.agents.values()] == [0, 0]
        assert f"meshwright.train.launch.agent {machines.address}" in machines.said.read_text()
        machines.launch()
        for number in range(2):
            machines.join(number)
        assert machines.finished() == undisturbed
        assert machines.events("restart") == [] and len(machines.events("restore")) == 1


@pytest.mark.slow
def test_a_lost_machine_is_rebuilt_from_parity(undisturbed, tmp_path):
    with Machines(tmp_path / "job", 2, *TWO, *KEPT) as machines:
        machines.wait_protected(15, hosts=[0, 1])
        lost = machines.host_of(1)
        machines.lose(1)
        shutil.rmtree(machines.memory(lost))
        machines.join(1)
        assert machines.finished() == undisturbed
        (restore,) = machines.events("restore")
        assert restore["level"] == "parity" and restore["step"] >= 15 and f"host {lost} lost" in restore["reason"]
        assert not any(machines.memory(host).exists() for host in (0, 1))


@pytest.mark.slow
def test_a_keeper_outlives_trainers_and_is_replaced_when_it_dies(undisturbed, tmp_path):
    with Machines(tmp_path / "job", 2, *TWO, *KEPT) as machines:

        def below(number, word):
            children = psutil.Process(machines.agents[number].pid).children()
            return next(child.pid for child in children if word in " ".join(child.cmdline()))

        machines.wait_protected(5, hosts=[0, 1])
        keepers = [below(number, "launch.snapshot_agent_main") for number in (0, 1)]
        os.kill(below(0, "train.cli"), signal.SIGKILL)
        machines.wait_until(lambda: len(machines.events("restore")) == 1, "no restore")
        assert [below(number, "launch.snapshot_agent_main") for number in (0, 1)] == keepers
        os.kill(keepers[1], signal.SIGKILL)
        machines.wait_protected(agent_files.read_protected(machines.memory(0)).step + 5, hosts=[0, 1])
        assert machines.finished() == undisturbed
        assert [event["level"] for event in machines.events("restore")] == ["memory"]
        told = [json.loads(line) for line in (machines.run / "keepers.jsonl").read_text().splitlines()]
        assert [event["event"] for event in told] == ["recovery", "keeper-lost"]


@pytest.mark.slow
def test_fewer_machines_protect_each_other_and_all_of_them_again(tmp_path):
    """One of four is lost for good: two go on. It comes back, is drained and returned; another is lost: parity."""
    with Machines(tmp_path / "whole", 4, *FOUR) as machines:
        undisturbed = machines.finished()
    with Machines(tmp_path / "job", 4, *FOUR) as machines:
        machines.wait_protected(10, hosts=range(4))
        gone = machines.host_of(3)
        machines.lose(3)
        shutil.rmtree(machines.memory(gone))
        machines.wait_until(lambda: machines.events("shrink"), "no shrink")
        (shrink,) = machines.events("shrink")
        machines.wait_until(lambda: len(machines.events("restore")) == 1, "no restore")
        began = machines.events("restore")[0]["step"]
        machines.wait_protected(began + 5, hosts=shrink["slots"])
        machines.join(3, said=[str(gone)])
        machines.wait_until(lambda: machines.events("grow"), "no grow")
        machines.wait_until(lambda: len(machines.events("restore")) == 2, "no restore")
        machines.wait_protected(machines.events("restore")[1]["step"] + 5, hosts=range(4))
        lost = machines.host_of(1)
        machines.lose(1)
        shutil.rmtree(machines.memory(lost))
        machines.join(1)
        assert machines.finished() == undisturbed
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
        machines.finished()
        assert machines.events("restart") == []
