"""The processes of one run on many machines, each under an agent that the engine brought up there. JAX-free.

    SLURM, Ray, Kubernetes, a person with a terminal   ->   agents   ->   trainers
    what differs: `Hosts`                                   what is common: `RemoteEngine`, behind the supervisor

The coordination service of JAX runs beside the supervisor, so that any machine of the run may be lost.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from ...checkpoint.redundancy import agent_files
from ...configs.errors import MeshwrightError, Preemption
from ..core.rendezvous import MembershipStore, Server
from .agent_server import AgentServer
from .job import Job, supervise_job
from .local_processes import describe_end, free_port, kill_groups, start_coordination_service
from .network_probe import Links, collect_links
from .snapshot_agent_process import RemoteSnapshotAgents
from .supervisor import StopRequest
from .telemetry import Telemetry

FORWARDED = ("MESHWRIGHT_", "JAX_", "XLA_", "HF_", "NCCL_", "GLOO_")  # the launcher's environment that trainers get
KILL_TIMEOUT = 10.0  # seconds for an agent to say that its trainer is dead
LOG_SECONDS = 15.0  # between two log lines while machines are awaited

logger = logging.getLogger(__name__)


def run_on_hosts(hosts: "Hosts", job: Job, *, stop: StopRequest, port: int = 0) -> None:
    """Supervise `job` on machines; raises as `Supervisor.run` does. Agents dial `port`, 0: any that is free."""
    with Server("0.0.0.0") as server, AgentServer(job.processes, port=port) as agent_server:
        rendezvous = f"{hosts.name}:{server.address.rpartition(':')[2]}"
        engine = RemoteEngine(job, hosts=hosts, agent_server=agent_server, rendezvous=rendezvous, stop=stop)
        try:
            engine.acquire(range(job.processes))
            telemetry = Telemetry(job.directory, lambda: engine.measure_links(server.store))
            telemetry.check_links()
            launcher = RemoteSnapshotAgents(agent_server, job.parity_plan, job.directory, rendezvous=rendezvous)
            supervise_job(job, engine, launcher, store=server.store, stop=stop, telemetry=telemetry)
        finally:
            engine.close()


class Hosts(Protocol):
    """Brings up agents on machines."""

    name: str  # of this machine, as the others reach it

    def start(self, machines: Mapping[int, str], port: int) -> None:
        """Bring up an agent for each slot in `machines`, which has none; agents dial `name`:`port`.

        `machines` maps a slot to the machine of its last agent, "?" where there was none.
        """

    def failure(self) -> str | None:
        """Why agents will not come; None where they may. Asked again and again while some are awaited."""

    def hint(self) -> str:
        """What to add to the error where agents did not come in time."""

    def discard(self, slot: int) -> None:
        """Make sure that an agent which does not answer does nothing. By default it ends by itself: the agent, having
        lost the supervisor, kills its trainer, and the fence keeps that from writing."""

    def close(self) -> None:
        """Give the machines back: the run is over. By default agents end when the supervisor tells them to."""


class LostMachine(int):
    """The exit code of a process whose machine is gone: that of SIGKILL, printed with the machine's name."""

    host: str

    def __new__(cls, host: str) -> "LostMachine":
        """`host` is the name the machine had."""
        code = super().__new__(cls, -signal.SIGKILL)
        code.host = host
        return code

    def __repr__(self) -> str:
        return f"lost with {self.host}"


class RemoteEngine:
    """Runs a job's processes under agents on `hosts`. `rendezvous` is the HOST:PORT to which they report."""

    def __init__(
        self, job: Job, *, hosts: Hosts, agent_server: AgentServer, rendezvous: str, stop: StopRequest
    ) -> None:
        self._job, self._hosts, self._agent_server = job, hosts, agent_server
        self._rendezvous, self._stop = rendezvous, stop
        self.processes = job.processes
        self._slots: Sequence[int] = range(job.processes)  # slot of each process of the epoch
        self._pending: set[int] = set()  # slots whose agents were brought up and have not connected yet
        self._failure: str | None = None  # why they will not come
        self._epoch, self._measurements = 0, 0
        self._service: subprocess.Popen | None = None  # the coordination service

    def available_slots(self) -> set[int]:
        """Slots whose agent is connected; brings up agents for the others, and looks for failures of those to come."""
        connected = self._agent_server.connected_slots
        self._pending -= connected
        self._failure = self._hosts.failure() if self._pending else None
        if missing := set(range(self._job.processes)) - connected - self._pending:
            self._pending |= missing
            machines = {slot: self._agent_server.host(slot) for slot in sorted(missing)}
            self._hosts.start(machines, self._agent_server.port)
        return connected

    def acquire(self, slots: Collection[int]) -> None:
        """Wait until each of `slots` has an agent.

        Raises MeshwrightError where machines do not come in time, Preemption where a stop is requested meanwhile.
        """
        waited = 0.0
        while missing := set(slots) - self.available_slots():
            if self._stop.requested:
                raise Preemption(f"stopped on request while processes {sorted(missing)} had no machine; run it again")
            self._agent_server.wait_connected(missing, 0.5)
            waited += 0.5
            if waited % LOG_SECONDS == 0:
                logger.warning("waiting for machines for processes %s of %d", sorted(missing), self._job.processes)
            failure = self._failure
            if failure is None and waited > self._job.elastic.start_timeout:
                failure = f"no agent connected within {waited:.0f} s (elastic.start_timeout){self._hosts.hint()}"
            if failure is not None:
                raise MeshwrightError(f"no machine for processes {sorted(missing)} of {self._job.processes}: {failure}")

    def start(self, epoch: int, *, slots: Sequence[int], overrides: Sequence[str]) -> None:
        """Start a trainer in each of `slots`, with `overrides` after the command; raises as `acquire` does."""
        self._slots = list(slots)
        self.acquire(self._slots)
        self._epoch, self.processes = epoch, len(self._slots)
        address = f"{self._hosts.name}:{free_port()}"
        self._service = start_coordination_service(address, self.processes)
        forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        forwarded.pop(agent_files.MEMORY_VARIABLE, None)  # each machine has its own
        message = {"do": "start", "epoch": epoch, "command": [*self._job.command, *overrides], "directory": os.getcwd()}
        for index, slot in enumerate(self._slots):
            info = self._job.process_info(
                index, slot, len(slots), epoch, coordinator=address, rendezvous=self._rendezvous
            )
            environment = forwarded | info.to_environment()
            self._agent_server.send(slot, {**message, "environment": environment, "quiet": index > 0})

    def poll(self, index: int) -> int | None:
        """Exit code of a process; `LostMachine` where its machine is gone; None while it runs."""
        slot = self._slots[index]
        code = self._agent_server.exit_code(slot, epoch=self._epoch)
        if code is None and not self._agent_server.started_trainer(slot, epoch=self._epoch):
            return LostMachine(self._agent_server.host(slot))
        return code

    def service_failure(self) -> str | None:
        """How the coordination service ended; None while it runs."""
        return describe_end(self._service)

    def request_stop(self) -> None:
        """Have every trainer get SIGTERM: they save and exit."""
        for slot in self._agent_server.connected_slots:
            self._agent_server.send(slot, {"do": "stop"})

    def kill(self) -> None:
        """Have what is left of every trainer killed. An agent that does not confirm in time is discarded."""
        slots = range(self._job.processes)
        for slot in slots:
            self._agent_server.send(slot, {"do": "kill"})
        unconfirmed = self._agent_server.wait_killed(slots, KILL_TIMEOUT)
        for slot in unconfirmed | (set(slots) - self._agent_server.connected_slots - self._pending):
            self._agent_server.disconnect(slot)
            self._hosts.discard(slot)
            self._pending.discard(slot)
        kill_groups([self._service])
        self._service = None

    def measure_links(self, store: MembershipStore) -> Links | None:
        """Have the agents measure the links between them now; None for one process, or where agents are missing."""
        if self.processes < 2 or set(self._slots) - self._agent_server.connected_slots:
            return None
        self._measurements += 1
        session = f"{self._epoch}.{self._measurements}"
        message = {"do": "probe", "session": session, "rendezvous": self._rendezvous, "processes": self.processes}
        for index, slot in enumerate(self._slots):
            self._agent_server.send(slot, {**message, "number": index})
        return collect_links(store, session=session, processes=self.processes)

    def close(self) -> None:
        """Let agents and machines go."""
        for slot in range(self._job.processes):
            self._agent_server.send(slot, {"do": "end"})
        self._hosts.close()
