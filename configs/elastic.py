"""What the launcher does when a process dies or hangs."""

from pydantic import Field

from .base import Section


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
