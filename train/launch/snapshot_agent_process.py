"""Starts snapshot agents: as processes of this machine, or through the agents of other machines. JAX-free.

    LocalSnapshotAgents(run, rendezvous=...)                  every host is simulated on this machine
    RemoteSnapshotAgents(agent_server, plan, run, ...)        an agent of each host starts the host's snapshot agent

Both start and kill a host's snapshot agent and say how it ended; when to do so is decided in `snapshot_agents.py`. A
snapshot agent holds nothing that is not in shared memory, so killing one loses nothing.
"""

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...checkpoint.redundancy import agent_files
from ...checkpoint.redundancy.parity_plan import ParityPlan
from ...configs.errors import MeshwrightError
from .agent_server import AgentServer

COMMAND = [sys.executable, "-m", "meshwright.train.launch.snapshot_agent_main"]

logger = logging.getLogger(__name__)


class SnapshotAgentLauncher(Protocol):
    """Starts snapshot agents."""

    def check(self, plan: ParityPlan) -> None:
        """Raise MeshwrightError where the machines are not the hosts of `plan`. By default one machine is all hosts."""

    def start(self, host: int, plan: ParityPlan) -> bool:
        """Start the agent of a host, in place of an earlier one; false where the host's machine is not there."""

    def failure(self, host: int) -> str | None:
        """How the agent that was started ended, as a text; None while it runs."""

    def kill(self, host: int) -> None:
        """Send SIGKILL to one that hangs."""

    def close(self) -> None:
        """End all, and delete what they left where the trainers left no snapshot: the run is over."""


class SnapshotAgentProcess:
    """The process of a host's snapshot agent on this machine; others reach it by `name`, it listens at `bind`."""

    def __init__(self, settings: Mapping[str, Any], *, run: Path, rendezvous: str, name: str, bind: str) -> None:
        self.directory = agent_files.memory_directory(run, host=settings["host"])
        settings = {**settings, "directory": str(self.directory), "rendezvous": rendezvous, "name": name, "bind": bind}
        self._process = subprocess.Popen([*COMMAND, json.dumps(settings)], start_new_session=True)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Send SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kill it, and delete what agents left in a directory without snapshots."""
        self.kill()
        agent_files.remove_leftovers(self.directory)


class LocalSnapshotAgents(SnapshotAgentLauncher):
    """Starts snapshot agents as processes of this machine, which may pass for any number of hosts."""

    def __init__(self, run: Path, *, rendezvous: str) -> None:
        self._run, self._rendezvous = run, rendezvous
        self._agents: dict[int, SnapshotAgentProcess] = {}

    def start(self, host: int, plan: ParityPlan) -> bool:
        """Start a process that listens on loopback."""
        self._agents[host] = SnapshotAgentProcess(
            agent_settings(host, plan), run=self._run, rendezvous=self._rendezvous, name="127.0.0.1", bind="127.0.0.1"
        )
        return True

    def failure(self, host: int) -> str | None:
        """Its exit code, as a text."""
        code = self._agents[host].poll()
        return None if code is None else f"exit code {code}"

    def kill(self, host: int) -> None:
        """Send SIGKILL."""
        self._agents[host].kill()

    def pid(self, host: int) -> int:
        """The process id of a host's agent."""
        return self._agents[host].pid

    def close(self) -> None:
        """End all agents."""
        for agent in self._agents.values():
            agent.end()


class RemoteSnapshotAgents(SnapshotAgentLauncher):
    """Has the agents that are connected to `agent_server` start snapshot agents; `plan` is that of the whole run.

    An agent kills its snapshot agent when it starts the next one, and when it ends.
    """

    def __init__(self, agent_server: AgentServer, plan: ParityPlan, run: Path, *, rendezvous: str) -> None:
        self._agent_server, self._plan = agent_server, plan
        self._run, self._rendezvous = run.absolute(), rendezvous
        self._starters: dict[int, int] = {}  # host -> the slot whose agent was told to start its snapshot agent
        self._warned = False

    def check(self, plan: ParityPlan) -> None:
        """Raise MeshwrightError where a host is more than one machine.

        Warns where more hosts of a parity group are on one machine than their parity can rebuild.
        """
        machines = {}
        for host in plan.active_hosts:
            names = sorted({self._agent_server.host(slot) for slot in plan.slots_of(host)})
            if len(names) > 1:
                raise MeshwrightError(
                    f"launch.hosts: {plan.hosts}, and processes {plan.slots_of(host)}, which should share a host, are "
                    f"on {' and '.join(names)}; set it to {plan.processes}, each process a host of its own"
                )
            machines[host] = names[0]
        for group in plan.groups if plan.max_lost_hosts and not self._warned else ():
            machine, count = Counter(machines[host] for host in group).most_common(1)[0]
            if count > plan.max_lost_hosts:
                self._warned = True
                logger.warning(
                    "hosts %s of one parity group are all on %s: with it more is lost than checkpoint.parity bears",
                    [host for host in group if machines[host] == machine],
                    machine,
                )

    def start(self, host: int, plan: ParityPlan) -> bool:
        """Tell the first agent of the host that is connected."""
        connected = sorted(set(self._plan.slots_of(host)) & self._agent_server.connected_slots)
        if not connected:
            return False
        self._starters[host] = connected[0]
        message = {"do": "start-snapshot-agent", "run": str(self._run), "rendezvous": self._rendezvous}
        self._agent_server.send(connected[0], {**message, "settings": agent_settings(host, plan)})
        return True

    def failure(self, host: int) -> str | None:
        """What the agent that started it reports."""
        return self._agent_server.snapshot_agent_failure(self._starters[host])


def agent_settings(host: int, plan: ParityPlan) -> dict[str, Any]:
    """Settings of a host's snapshot agent, wherever it runs."""
    return {
        "host": host,
        "launch_slots": plan.slots_of(host),
        "groups": plan.groups,
        "max_lost_hosts": plan.max_lost_hosts,
    }
