"""No state is saved that a device has damaged: with `checkpoint.compare`, what several devices hold is compared before.

vouch = vouching(program)
vouch(state, 12)            raises Corrupted, naming array and device
"""

import logging
import time
from collections.abc import Callable

import jax

from ..configs.errors import MeshwrightError
from ..parallel.replica_check import Difference, Duplicates
from ..parallel.state import TrainState
from .core.heartbeat import ERRS, Progress
from .engine.program import Program

CONFESSION = 1.0  # seconds for the launcher to hear from the process to blame, before any ends

Vouch = Callable[[TrainState, int], None]

logger = logging.getLogger(__name__)


class Corrupted(MeshwrightError):
    """Devices hold different bits of what should be the same: one of them computes or remembers wrongly."""


def vouching(program: Program, progress: Progress) -> Vouch:
    """Raises where `checkpoint.compare` is set and a state is not the same on all devices that hold it. Collective.

    The process to blame tells `progress`.
    """
    if not program.config.checkpoint.compare:
        return lambda state, step: None
    duplicates = Duplicates(program.shapes, program.shardings, program.mesh)
    if not duplicates.any:
        logger.warning(
            "checkpoint.compare: true, but every device holds a part of its own: there is nothing to compare"
        )

    def vouch(state: TrainState, step: int) -> None:
        if found := duplicates.differing(state):
            if jax.process_index() in blamed(found):
                progress.report(step, ERRS)
            time.sleep(CONFESSION)
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise Corrupted(
                f"step {step} is not saved: {found[0]}{more}; a device computes or remembers wrongly, which "
                "`meshwright doctor` may find. Run the same command to go on from the save before"
            )

    return vouch


def blamed(found: list[Difference]) -> set[int]:
    """The processes whose devices hold what most do not; none where there is no most."""
    return {device.process_index for one in found if one.others for device in one.devices}
