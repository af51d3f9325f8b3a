"""Engines by name, and the launch of a job on one of them. JAX-free.

An engine brings processes up, polls and kills them; what to do when one dies or hangs is decided by the supervisor, for
all engines alike. A new engine is a file with `launch(job)` and a line here; it is imported when it is asked for.
"""

import importlib
from contextlib import ExitStack

from ...configs.sections.launch import LaunchConfig
from ..core.rendezvous import Server
from ..core.signals import StopSignals
from .job import Job, supervise_job
from .local_processes import LocalEngine
from .snapshot_agent_process import LocalSnapshotAgents
from .supervisor import StopRequest
from .telemetry import Telemetry

# Engine -> the module of this package that launches on it; `local` is `launch_local`.
ENGINES = {"local": "", "slurm": "slurm", "ray": "ray_cluster", "k8s": "kubernetes", "agents": "manual"}


def count_hosts(engine: str, settings: LaunchConfig, *, processes: int) -> int:
    """Over how many hosts the processes of a run are spread, in order."""
    if settings.hosts is not None:
        return settings.hosts
    return {"local": 1, "slurm": settings.slurm.nodes}.get(engine, processes)


def launch(engine: str, job: Job) -> None:
    """Launch on the engine of that name; raises as `Supervisor.run` does."""
    if engine == "local":
        launch_local(job)
    else:
        importlib.import_module(f".{ENGINES[engine]}", __package__).launch(job)


def launch_local(job: Job, *, stop: StopRequest | None = None) -> None:
    """Run on this machine until all processes end well; raises as `Supervisor.run` does.

    `stop` says when to stop; None: at SIGTERM and Ctrl-C.
    """
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignals())
        server = stack.enter_context(Server())
        launcher = LocalSnapshotAgents(job.directory, rendezvous=server.address)
        engine = LocalEngine(job, rendezvous=server.address)
        supervise_job(job, engine, launcher, store=server.store, stop=stop, telemetry=Telemetry(job.directory))
