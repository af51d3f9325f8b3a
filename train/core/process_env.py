"""Rank and addresses of this process, from the environment of the launcher or of SLURM. JAX-free."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ...configs.errors import UserError

COORDINATOR, COUNT, NUMBER = "MESHWRIGHT_COORDINATOR", "MESHWRIGHT_PROCESSES", "MESHWRIGHT_PROCESS"
DEVICES = "MESHWRIGHT_DEVICES_PER_PROCESS"
EPOCH, RENDEZVOUS, COORDINATED = "MESHWRIGHT_EPOCH", "MESHWRIGHT_RENDEZVOUS", "MESHWRIGHT_COORDINATION"
SLOT = "MESHWRIGHT_SLOT"  # the launcher slot of a process
HOST = "MESHWRIGHT_HOST"  # the number of its host; set if the host has a snapshot agent
SLURM_PORT = 61_000  # plus the job number modulo 4096, so that jobs on one node use different ports


@dataclass(frozen=True)
class ProcessInfo:
    """This process is number `process` of `processes`; their coordination service is at `coordinator`."""

    process: int = 0
    processes: int = 1
    coordinator: str | None = None
    local_devices: int | None = None  # simulated devices of this process; None: all of `mesh.devices`
    epoch: int | None = None  # number of this start of the run; None: no supervisor counts them
    rendezvous: str | None = None  # host:port of the supervisor's membership store, which gets the progress reports
    external_coordinator: bool = False  # the coordination service runs in a process of its own, not in process 0
    slot: int | None = None  # launcher slot, which stays when the number of processes changes; None: no launcher
    host: int | None = None  # number of its host; None: the host has no snapshot agent

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes the run's files."""
        return self.process == 0

    def to_environment(self) -> dict[str, str]:
        """The environment variables from which `read_process_info` makes this value again."""
        values = {
            COORDINATOR: self.coordinator,
            COUNT: self.processes,
            NUMBER: self.process,
            DEVICES: self.local_devices,
            EPOCH: self.epoch,
            RENDEZVOUS: self.rendezvous,
            COORDINATED: "outside" if self.external_coordinator else None,
            SLOT: self.slot,
            HOST: self.host,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def read_process_info(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Read the variables of `meshwright launch` (MESHWRIGHT_*) or of a SLURM step with several tasks.

    Without either this is the only process. Raises UserError if the variables are incomplete.
    """
    if COORDINATOR in environment:
        if missing := [name for name in (COUNT, NUMBER) if not environment.get(name, "").isdigit()]:
            raise UserError(
                f"{COORDINATOR} is set but {', '.join(missing)} is not a number; set all of {COORDINATOR}, {COUNT} and "
                f"{NUMBER}, or none"
            )
        process, processes = int(environment[NUMBER]), int(environment[COUNT])
        if process >= processes:
            raise UserError(f"{NUMBER}: {process} must be below {COUNT} ({processes})")
        devices, epoch, slot, host = (
            int(environment[name]) if environment.get(name) else None for name in (DEVICES, EPOCH, SLOT, HOST)
        )
        external = environment.get(COORDINATED) == "outside"
        coordinator, rendezvous = environment[COORDINATOR], environment.get(RENDEZVOUS)
        return ProcessInfo(process, processes, coordinator, devices, epoch, rendezvous, external, slot, host)
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        port = SLURM_PORT + int(environment["SLURM_JOB_ID"]) % 4096
        host = first_host(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
        return ProcessInfo(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), f"{host}:{port}")
    return ProcessInfo()


def first_host(nodes: str) -> str:
    """Return the first node of a SLURM node list.

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    >>> first_host("a1,a2")
    'a1'
    """
    head = nodes.split(",")[0]
    prefix, bracket, inside = head.partition("[")
    return prefix + inside.split("-")[0].rstrip("]") if bracket else head
