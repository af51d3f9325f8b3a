"""Engines by name, and the launch of a run on one of them. JAX-free.

An engine brings processes up, polls and kills them; what to do when one dies or hangs is the supervisor's, and the same
for all. A new engine is a file with `launch(job)` and a line here; it is imported when it is asked for.
"""

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path

from ...configs.elastic import ElasticConfig
from .job import Job
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
    else:
        importlib.import_module(f".{ENGINES[engine]}", __package__).launch(job)


def launch_here(job: Job, *, stop: Stop | None = None) -> None:
    """Launch on this machine."""
    launch(
        job.command,
        processes=job.processes,
        directory=job.directory,
        settings=job.elastic,
        devices_per_process=job.devices_per_process,
        coordinator=job.settings.coordinator,
        stop=stop,
    )


def launch(
    command: Sequence[str],
    *,
    processes: int,
    directory: Path,
    settings: ElasticConfig,
    devices_per_process: int | None = None,
    coordinator: str | None = None,
    stop: Stop | None = None,
) -> None:
    """Run `command` in `processes` processes on this machine until all end well; see `supervise` for what it raises.

    `directory` is the run's. `stop`: who asks; None: SIGTERM and Ctrl-C.
    """
    with contextlib.nullcontext(stop) if stop is not None else StopSignals() as asked, Server() as server:
        engine = LocalEngine(
            command,
            processes=processes,
            rendezvous=server.address,
            devices_per_process=devices_per_process,
            coordinator=coordinator,
        )
        telemetry = Telemetry(directory)
        supervise(engine, settings=settings, directory=directory, room=server.room, stop=asked, telemetry=telemetry)
