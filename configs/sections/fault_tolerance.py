"""What the launcher does when a process dies or hangs."""

from pydantic import Field

from .base import Section
from .parallel import AxesConfig


class ElasticConfig(Section):
    """Restarts by `meshwright launch`: all processes start again, from the newest whole checkpoint, in a new epoch."""

    restarts: int = Field(3, ge=0)
    """Failures within `window` that are answered by a restart; one more and the launcher gives up. 0: never restart."""
    window: float = Field(3600.0, gt=0)
    """Seconds a failure counts."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before a restart; doubled, up to a minute, for each failure in a row that made no progress."""
    hang_factor: float = Field(20.0, ge=2)
    """A step that takes this multiple of the median step is a hang."""
    hang_floor: float = Field(120.0, gt=0)
    """Seconds that are never a hang: an evaluation or a save must fit."""
    start_timeout: float = Field(1800.0, gt=0)
    """Seconds from the start of the processes to their first step: data, restore, compilation."""
    grace: float = Field(30.0, ge=0)
    """Seconds the processes have to save and stop on request; what is left is killed."""
    meshes: list[AxesConfig] = []
    """Meshes to go on with where hosts are lost for good, in this order, after `mesh` itself: the first that fits what
    is left. An entry replaces the axes of `mesh`; those it does not name are 1."""
    replace: float = Field(60.0, ge=0)
    """Seconds to wait for a lost host to be replaced before going on with fewer."""
    strikes: int = Field(2, ge=0)
    """Failures of one slot (a host) within `window` after which the run goes on without it, where a mesh of `meshes`
    can; it is used again when they are older. 0: never."""
    settle: float = Field(30.0, ge=0)
    """Seconds a host must have been back before the run is stopped, saved, and started on the larger mesh."""
    deterministic: bool = False
    """Gradients are added in one order on every mesh: the same parameters, bit for bit, on CPUs of one kind. `data` is
    then the only axis above 1, and a microbatch is computed whole by one device."""
