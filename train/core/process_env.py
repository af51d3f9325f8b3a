"""Who this process is among the processes of a run: from the launcher's environment, SLURM, or alone. JAX-free."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ...configs.errors import UserError

COORDINATOR, COUNT, NUMBER = "MESHWRIGHT_COORDINATOR", "MESHWRIGHT_PROCESSES", "MESHWRIGHT_PROCESS"
DEVICES = "MESHWRIGHT_DEVICES_PER_PROCESS"
EPOCH, RENDEZVOUS, COORDINATED = "MESHWRIGHT_EPOCH", "MESHWRIGHT_RENDEZVOUS", "MESHWRIGHT_COORDINATION"
SLOT = "MESHWRIGHT_SLOT"  # the launcher's name for the place of a process
HOST = "MESHWRIGHT_HOST"  # the number of its host; set where a keeper looks after the host's snapshots
SLURM_PORT = 61_000  # plus the job's number modulo 4096: jobs on one node must not meet


@dataclass(frozen=True)
class World:
    """This process's place: number `process` of `processes`, meeting the others at `coordinator`."""

    process: int = 0
    processes: int = 1
    coordinator: str | None = None
    local_devices: int | None = None  # simulated devices of this process; None: all of mesh.devices
    epoch: int | None = None  # of the run's memberships; None: no supervisor counts them
    rendezvous: str | None = None  # where the supervisor hears of steps
    outside: bool = False  # the coordination service runs in a process of its own, not in process 0
    slot: int | None = None  # its place, which keeps its number where a run goes on with fewer; None: no launcher
    host: int | None = None  # the number of its host, whose snapshots a keeper looks after; None: there is none

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.process == 0


def world(environment: Mapping[str, str] = os.environ) -> World:
    """From `meshwright launch` (MESHWRIGHT_*), a SLURM step of several tasks, or a process alone.

    Raises UserError where the variables are incomplete.
    """
    if COORDINATOR in environment:
        if missing := [name for name in (COUNT, NUMBER) if not environment.get(name, "").isdigit()]:
            raise UserError(f"{COORDINATOR} is set but {', '.join(missing)} is not a number; set all three or none")
        process, processes = int(environment[NUMBER]), int(environment[COUNT])
        if process >= processes:
            raise UserError(f"{NUMBER}: {process} must be below {COUNT} ({processes})")
        devices = environment.get(DEVICES)
        epoch, slot, host = environment.get(EPOCH), environment.get(SLOT), environment.get(HOST)
        return World(
            process,
            processes,
            environment[COORDINATOR],
            int(devices) if devices else None,
            int(epoch) if epoch else None,
            environment.get(RENDEZVOUS),
            environment.get(COORDINATED) == "outside",
            int(slot) if slot else None,
            int(host) if host else None,
        )
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        port = SLURM_PORT + int(environment["SLURM_JOB_ID"]) % 4096
        host = first_host(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
        return World(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), f"{host}:{port}")
    return World()


def seat(slot: int, *, host: int | None) -> dict[str, str]:
    """What the environment of the process in a slot says of its place."""
    return {SLOT: str(slot)} | ({} if host is None else {HOST: str(host)})


def first_host(nodes: str) -> str:
    """The first node of a SLURM node list.

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    >>> first_host("a1,a2")
    'a1'
    """
    head = nodes.split(",")[0]
    prefix, bracket, inside = head.partition("[")
    return prefix + inside.split("-")[0].rstrip("]") if bracket else head
