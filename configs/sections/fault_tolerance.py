"""The section elastic: what the launcher does when a process dies or hangs."""

from pydantic import Field

from .base import Section
from .parallel import AxesConfig


class ElasticConfig(Section):
    """Restarts by `meshwright launch`: all processes start again from the newest complete checkpoint."""

    restarts: int = Field(3, ge=0)
    """Failures within `window` after which the run restarts; at one more the launcher gives up. 0: never restart."""
    window: float = Field(3600.0, gt=0)
    """Seconds for which a failure counts."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before a restart; doubled, up to 60, after each further failure without progress between."""
    hang_factor: float = Field(20.0, ge=2)
    """A step is a hang when it takes this multiple of the median step."""
    hang_floor: float = Field(120.0, gt=0)
    """Seconds below which a step is never a hang; an evaluation or a save must fit."""
    start_timeout: float = Field(1800.0, gt=0)
    """Seconds from the start of the processes to their first step (data, restore, compilation) before it is a hang."""
    grace: float = Field(30.0, ge=0)
    """Seconds that processes have to save and stop on request before they are killed."""
    meshes: list[AxesConfig] = []
    """Meshes to continue on after hosts are lost for good: `mesh` itself, then these in order; the first that fits the
    remaining hosts is used. An entry replaces the axes of `mesh`; axes it does not name are 1. []: only `mesh`."""
    replace: float = Field(60.0, ge=0)
    """Seconds to wait for the replacement of a lost host before the run continues with fewer."""
    strikes: int = Field(2, ge=0)
    """Failures of one slot (a host) within `window` after which the run continues without it, if a mesh of `meshes`
    fits; the slot is used again when the failures are older. 0: never."""
    settle: float = Field(30.0, ge=0)
    """Seconds for which a returned host must stay before the run is saved and restarted on the larger mesh."""
    deterministic: bool = False
    """Add gradients in one order on every mesh: parameters are equal bit for bit on CPUs of one kind. `data` must be
    the only axis above 1, and one device computes a microbatch alone."""
