"""Silent data corruption check: before every save, devices that should hold the same bits are compared.

`checkpoint.compare` turns it on, so that no state is saved that a device has corrupted.

    check_state = make_state_check(program, progress)
    check_state(state, 12)            raises CorruptedStateError, which names the array and the device
"""

import logging
import time
from collections.abc import Callable

import jax

from ..configs.errors import MeshwrightError
from ..parallel.replica_check import ReplicaCheck
from ..parallel.state import TrainState
from .core.heartbeat import CORRUPT_PHASE, ProgressReporter
from .engine.program import Program

REPORT_GRACE_SECONDS = 1.0  # wait before exit, so that the supervisor reads the corrupt process's report first

StateCheck = Callable[[TrainState, int], None]

logger = logging.getLogger(__name__)


class CorruptedStateError(MeshwrightError):
    """Devices hold different bits of one array: one of them computes or stores wrong values."""


def make_state_check(program: Program, progress: ProgressReporter) -> StateCheck:
    """Return a collective check that raises CorruptedStateError if devices differ.

    It does nothing without `checkpoint.compare`. A process whose devices are suspect reports so to `progress`.
    """
    if not program.config.checkpoint.compare:
        return lambda state, step: None
    check = ReplicaCheck(program.shapes, program.shardings, program.mesh)
    if not check.has_replicas:
        logger.warning("checkpoint.compare: true, but no array is on two devices, so there is nothing to compare")

    def check_state(state: TrainState, step: int) -> None:
        if mismatches := check.find_mismatches(state):
            suspects = [device for mismatch in mismatches if mismatch.majority for device in mismatch.suspects]
            if jax.process_index() in {device.process_index for device in suspects}:
                progress.report(step, CORRUPT_PHASE)
            time.sleep(REPORT_GRACE_SECONDS)
            more = f" and {len(mismatches) - 1} more" if len(mismatches) > 1 else ""
            raise CorruptedStateError(
                f"step {step} is not saved: {mismatches[0]}{more}; a device computes or stores wrong values, which "
                "`meshwright doctor` may find. Run the same command to go on from the save before"
            )

    return check_state
