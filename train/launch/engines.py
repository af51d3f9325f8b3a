"""Engines by name, and the launch of a run on one of them. JAX-free.

An engine brings processes up, polls and kills them; what to do when one dies or hangs is the supervisor's, and the same
for all. A new engine is a file with `launch(job)` and a line here; it is imported when it is asked for.
"""

import importlib
from contextlib import ExitStack

from ...configs.errors import UserError
from .job import Job
from .keepers import Keepers
from .local import LocalEngine
from .rendezvous import Server
from .signals import StopSignals
from .supervisor import Stop, supervise
from .telemetry import Telemetry

# Engine -> the file beside this one that launches on it; local is here.
ENGINES = {"local": "", "slurm": "slurm", "ray": "ray_cluster", "k8s": "kubernetes", "agents": "by_hand"}


def start(engine: str, job: Job) -> None:
    """Launch on the engine of that name; see `supervise` for what it raises."""
    if engine == "local":
        launch_here(job)
    elif job.keepers is not None and job.keepers.losses:
        raise UserError(f"checkpoint.parity: engine {engine} starts no keepers; set it to none, or use --engine local")
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
        )
        if job.keepers is not None:
            engine = stack.enter_context(Keepers(job.keepers, run=job.directory, server=server)).before(engine)
        supervise(
            engine,
            settings=job.elastic,
            directory=job.directory,
            room=server.room,
            stop=asked,
            formations=job.formations,
            telemetry=Telemetry(job.directory),
        )
