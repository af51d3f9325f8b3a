"""Processes of one run on many machines, each under an agent that the engine brought up there. JAX-free.

    SLURM, Ray, Kubernetes, a person with a terminal   ->   agents   ->   trainers
    what differs: `Hosts`                                   what is one: `RemoteEngine`, behind the supervisor

The coordination service of JAX runs beside the supervisor, so that any machine of the run may be lost.
"""

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from ...checkpoint.redundancy import agent_files
from ...configs.errors import MeshwrightError, Preempted
from ..core import process_env
from ..core.rendezvous import Room, Server
from . import local_processes
from .agent_server import Switchboard
from .job import Job
from .network_probe import Links, collected
from .snapshot_agent_process import There
from .snapshot_agents import Keepers
from .supervisor import Stop, supervise
from .telemetry import Telemetry

FORWARDED = ("MESHWRIGHT_", "JAX_", "XLA_", "HF_", "NCCL_", "GLOO_")  # the launcher's environment that trainers get
KILL_SECONDS = 10.0  # for an agent to say that its trainer is dead
NEWS_SECONDS = 15.0  # between two words while machines are awaited

logger = logging.getLogger(__name__)


def run_on(hosts: "Hosts", job: Job, *, stop: Stop, port: int = 0) -> None:
    """Supervise `job` on machines; see `supervise` for what it raises. Agents dial `port`, 0: any that is free."""
    with Server("0.0.0.0") as server, Switchboard(job.processes, port=port) as board, ExitStack() as stack:
        engine = remote = RemoteEngine(
            job.command,
            processes=job.processes,
            hosts=hosts,
            board=board,
            port=int(server.address.rpartition(":")[2]),
            patience=job.elastic.start_timeout,
            shared={process_env.DEVICES: str(job.devices_per_process)} if job.devices_per_process else {},
            host_of=job.host_of,
            stop=stop,
        )
        telemetry = Telemetry(job.directory, lambda: remote.links(server.room))
        stack.callback(remote.close)
        remote.gather(range(job.processes))
        telemetry.begin()
        if job.keepers is not None:
            tending = There(board, job.keepers, job.directory, rendezvous=remote.rendezvous)
            keepers = Keepers(job.keepers, run=job.directory, room=server.room, tending=tending)
            engine = stack.enter_context(keepers).before(remote)
        supervise(
            engine,
            settings=job.elastic,
            directory=job.directory,
            room=server.room,
            stop=stop,
            formations=job.formations,
            telemetry=telemetry,
        )


class Hosts(Protocol):
    """Where agents are brought up."""

    name: str  # of this machine, as the others reach it

    def start(self, places: Mapping[int, str], port: int) -> None:
        """Bring up agents for the processes in `places`, which have none; they dial `name`:`port`.

        `places`: number -> the machine its last agent was on; "?" where there was none.
        """

    def trouble(self) -> str | None:
        """Why agents will not come; None where they may. Asked again and again while some are awaited."""

    def hint(self) -> str:
        """What to say beside the time-out when they never came."""

    def discard(self, number: int) -> None:
        """An agent that does not answer any more: make sure that it does nothing."""

    def close(self) -> None:
        """The run is over."""


class Lost(int):
    """The exit code of a process whose machine is gone: one of SIGKILL, with words."""

    host: str

    def __new__(cls, host: str) -> "Lost":
        """`host` is the name the machine had."""
        code = super().__new__(cls, -signal.SIGKILL)
        code.host = host
        return code

    def __repr__(self) -> str:
        return f"lost with {self.host}"


class RemoteEngine:
    """`command` in `processes` processes under agents on `hosts`. `port` is the rendezvous's on this machine."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int,
        hosts: Hosts,
        board: Switchboard,
        port: int,
        patience: float,
        shared: Mapping[str, str] | None = None,
        host_of: Callable[[int], int | None] = lambda slot: None,
        stop: Stop | None = None,
    ) -> None:
        self._stop = stop
        self.processes = self._room = processes
        self._slots: Sequence[int] = range(processes)  # slot of each process: the number of its agent
        self._awaited: set[int] = set()  # slots whose agents were brought up and have not come yet
        self._trouble: str | None = None  # why they will not come
        self._command, self._hosts, self._board, self._patience = list(command), hosts, board, patience
        self.rendezvous = f"{hosts.name}:{port}"
        self._shared = dict(shared or {})  # what every trainer's environment says besides
        self._host_of = host_of
        self._epoch, self._sessions = 0, 0
        self._coordinator: subprocess.Popen | None = None

    def slots(self) -> set[int]:
        """Slots whose agent is there now; replacements of the others are on their way, and looked after."""
        present = self._board.present
        self._awaited -= present
        self._trouble = self._hosts.trouble() if self._awaited else None
        if absent := set(range(self._room)) - present - self._awaited:
            self._awaited |= absent
            self._hosts.start({slot: self._board.host(slot) for slot in sorted(absent)}, self._board.port)
        return present

    def gather(self, slots: Collection[int]) -> None:
        """Have an agent in each of `slots`.

        Raises MeshwrightError where machines do not come in time, Preempted where somebody asks to stop meanwhile.
        """
        waited = 0.0
        while absent := set(slots) - self.slots():
            if self._stop is not None and self._stop.asked:
                raise Preempted(f"stopped on request while processes {sorted(absent)} had no machine; run it again")
            self._board.wait(absent, 0.5)
            waited += 0.5
            if waited % NEWS_SECONDS == 0:
                logger.warning("waiting for machines for processes %s of %d", sorted(absent), self._room)
            why = self._trouble
            if why is None and waited > self._patience:
                why = f"no word from them for {waited:.0f} s (elastic.start_timeout){self._hosts.hint()}"
            if why is not None:
                raise MeshwrightError(f"no machine for processes {sorted(absent)} of {self._room}: {why}")

    def start(self, epoch: int, *, slots: Sequence[int] | None = None, words: Sequence[str] = ()) -> None:
        """Start a trainer in each of `slots`, by default all, with `words` after the command.

        Raises MeshwrightError where machines do not come within the time a start may take.
        """
        self._slots = range(self._room) if slots is None else list(slots)
        self.gather(self._slots)
        self._epoch, self.processes = epoch, len(self._slots)
        address = f"{self._hosts.name}:{local_processes.free_port()}"
        if self.processes > 1:
            self._coordinator = local_processes.spawn(
                [*local_processes.COORDINATOR_HOST, address, str(self.processes)], os.environ
            )
        forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        forwarded.pop(agent_files.PLACE, None)  # each machine has its own
        shared = forwarded | self._shared | {
            process_env.COORDINATOR: address,
            process_env.COUNT: str(self.processes),
            process_env.EPOCH: str(epoch),
            process_env.RENDEZVOUS: self.rendezvous,
            process_env.COORDINATED: "outside",
        }  # fmt: skip
        said = {"do": "start", "epoch": epoch, "command": [*self._command, *words], "directory": os.getcwd()}
        for number, slot in enumerate(self._slots):
            own = {process_env.NUMBER: str(number)} | process_env.seat(slot, host=self._host_of(slot))
            self._board.tell(slot, {**said, "environment": shared | own, "quiet": number > 0})

    def poll(self, number: int) -> int | None:
        """Exit code of a process; `Lost` where its machine is gone."""
        slot = self._slots[number]
        code = self._board.code(slot, epoch=self._epoch)
        if code is None and not self._board.serves(slot, epoch=self._epoch):
            return Lost(self._board.host(slot))
        return code

    def broken(self) -> str | None:
        """Whether the coordination service died."""
        code = self._coordinator.poll() if self._coordinator is not None else None
        return None if code is None else f"the coordination service ended with exit code {code}"

    def ask_to_stop(self) -> None:
        """SIGTERM to every trainer: they save and exit."""
        for slot in self._board.present:
            self._board.tell(slot, {"do": "stop"})

    def kill(self) -> None:
        """SIGKILL to what is left of every trainer. An agent that does not say so in time is discarded."""
        everyone = range(self._room)
        for slot in everyone:
            self._board.tell(slot, {"do": "kill"})
        deaf = self._board.wait_killed(everyone, KILL_SECONDS)
        for slot in deaf | (set(everyone) - self._board.present - self._awaited):
            self._board.drop(slot)
            self._hosts.discard(slot)
            self._awaited.discard(slot)
        if self._coordinator is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._coordinator.pid, signal.SIGKILL)
            self._coordinator.wait()
            self._coordinator = None

    def links(self, room: Room) -> Links | None:
        """Have the agents measure the links between them now; None where there are none, or not all agents."""
        if self.processes < 2 or set(self._slots) - self._board.present:
            return None
        self._sessions += 1
        session = f"{self._epoch}.{self._sessions}"
        words = {"do": "probe", "session": session, "rendezvous": self.rendezvous, "processes": self.processes}
        for number, slot in enumerate(self._slots):
            self._board.tell(slot, {**words, "number": number})
        return collected(room, session=session, processes=self.processes)

    def close(self) -> None:
        """Let agents and machines go."""
        for slot in range(self._room):
            self._board.tell(slot, {"do": "end"})
        self._hosts.close()
