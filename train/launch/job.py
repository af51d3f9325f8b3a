"""A job: what `meshwright launch` asks an engine to run, and its supervision, which is the same for all. JAX-free."""

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from ...checkpoint.redundancy.parity_plan import ParityPlan
from ...configs.errors import UserError
from ...configs.sections.fault_tolerance import ElasticConfig
from ...configs.sections.launch import LaunchConfig
from ..core.process_env import ProcessInfo
from ..core.rendezvous import MembershipStore
from .mesh_options import MeshOption
from .snapshot_agent_process import SnapshotAgentLauncher
from .snapshot_agents import SnapshotAgents
from .supervisor import LaunchEngine, StopRequest, Supervisor
from .telemetry import Telemetry


@dataclass(frozen=True)
class Job:
    """`command` in `processes` processes."""

    name: str
    command: Sequence[str]
    processes: int
    directory: Path  # the run's
    elastic: ElasticConfig
    settings: LaunchConfig = field(default_factory=LaunchConfig)
    devices_per_process: int | None = None  # simulated
    mesh_options: Sequence[MeshOption] = ()  # meshes on which the run may go on, where fewer processes are left
    parity_plan: ParityPlan | None = None  # of its snapshots; None: they are not looked after
    document: str = ""  # the resolved configuration as YAML, for engines that send it along

    def process_info(
        self, index: int, slot: int, processes: int, epoch: int, *, coordinator: str, rendezvous: str
    ) -> ProcessInfo:
        """What process `index` of the `processes` of an epoch is told, in `slot`; addresses are HOST:PORT."""
        host = None if self.parity_plan is None else self.parity_plan.host_of(slot)
        return ProcessInfo(index, processes, coordinator, self.devices_per_process, epoch, rendezvous, True, slot, host)


def supervise_job(
    job: Job,
    engine: LaunchEngine,
    launcher: SnapshotAgentLauncher,
    *,
    store: MembershipStore,
    stop: StopRequest,
    telemetry: Telemetry,
) -> None:
    """Supervise `job` on `engine`; raises as `Supervisor.run` does.

    Where the job has a parity plan, `launcher` starts agents that look after its snapshots. Processes and snapshot
    agents report in `store`.
    """
    with ExitStack() as stack:
        if job.parity_plan is not None:
            agents = SnapshotAgents(job.parity_plan, run=job.directory, store=store, launcher=launcher)
            engine = stack.enter_context(agents).wrap(engine)
        Supervisor(engine, job.elastic, job.directory, store, stop, job.mesh_options, telemetry).run()


def import_optional(module: str, extra: str) -> ModuleType:
    """Import a package of an extra. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"pip install 'meshwright[{extra}]'"
        raise UserError(
            f"--engine: {extra} needs the package {module}, which does not import ({error}); {remedy}"
        ) from error
