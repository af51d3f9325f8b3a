"""What an engine is asked to run. JAX-free."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from ...checkpoint.redundancy.parity_plan import Plan
from ...configs.errors import UserError
from ...configs.sections.fault_tolerance import ElasticConfig
from ...configs.sections.launch import LaunchConfig
from .mesh_options import Formation


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
    formations: Sequence[Formation] = ()  # what it may go on as, where fewer processes are left
    keepers: Plan | None = None  # of its snapshots
    document: str = ""  # the resolved configuration as YAML, for engines that send it along

    def host_of(self, slot: int) -> int | None:
        """The host that a slot is on; None where no keeper looks after any."""
        return None if self.keepers is None else self.keepers.host_of(slot)


def needed(module: str, extra: str) -> ModuleType:
    """An optional package. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"pip install 'meshwright[{extra}]'"
        raise UserError(
            f"--engine: {extra} needs the package {module}, which does not import ({error}); {remedy}"
        ) from error
