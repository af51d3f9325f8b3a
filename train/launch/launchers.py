"""Engines by name, and the launch of a run on one of them. JAX-free.

An engine brings processes up, polls and kills them; what to do when one dies or hangs is the supervisor's, and the same
for all. A new engine is a file with `launch(job)` and a line here; it is imported when it is asked for.
"""

import importlib
from contextlib import ExitStack

from ...configs.sections.launch import LaunchConfig
from ..core.rendezvous import Server
from ..core.signals import StopSignals
from .job import Job
from .local_processes import LocalEngine
from .snapshot_agent_process import Here
from .snapshot_agents import Keepers
from .supervisor import Stop, supervise
from .telemetry import Telemetry

# Engine -> the file beside this one that launches on it; local is here.
ENGINES = {"local": "", "slurm": "slurm", "ray": "ray_cluster", "k8s": "kubernetes", "agents": "manual"}


def hosts_of(engine: str, settings: LaunchConfig, *, processes: int) -> int:
    """Over how many hosts the processes of a run are spread, in order."""
    if settings.hosts is not None:
        return settings.hosts
    return {"local": 1, "slurm": settings.slurm.nodes}.get(engine, processes)


def start(engine: str, job: Job) -> None:
    """Launch on the engine of that name; see `supervise` for what it raises."""
    if engine == "local":
        launch_here(job)
    else:
        importlib.import_module(f".{ENGINES[engine]}", __package__).launch(job)


def launch_here(job: Job, *, stop: Stop | None = None) -> None:
    """Run on this machine until all processes end well; see `supervise` for what it raises.

    `stop`: who asks to stop; None: SIGTERM and Ctrl-C.
    """
    with ExitStack() as stack:
        asked = stop or stack.enter_context(StopSignals())
        server = stack.enter_context(Server())
        engine = LocalEngine(
            job.command,
            processes=job.processes,
            rendezvous=server.address,
            devices_per_process=job.devices_per_process,
            coordinator=job.settings.coordinator,
            host_of=job.host_of,
        )
        if job.keepers is not None:
            tending = Here(job.directory, rendezvous=server.address)
            keepers = Keepers(job.keepers, run=job.directory, room=server.room, tending=tending)
            engine = stack.enter_context(keepers).before(engine)
        supervise(
            engine,
            settings=job.elastic,
            directory=job.directory,
            room=server.room,
            stop=asked,
            formations=job.formations,
            telemetry=Telemetry(job.directory),
        )
