"""The quantized base of a run, saved once next to its checkpoints, which hold the adapter only.

Quantizing again, on another mesh or with another version, may round a weight the other way, and the adapter would then
belong to another base. Frozen weights that are not quantized are not saved: a restored run makes exactly the same ones
again, from the seed or from `model.from`.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ...checkpoint.layout_conversion import make_layout
from ...checkpoint.manifest import DamagedCheckpoint
from ...checkpoint.storage import Storage
from ...configs.errors import UserError
from ...parallel.state import TrainState
from ..objectives.distillation import without_teacher
from .program import Program

DIRECTORY = "base"


def save_base(
    program: Program, state: TrainState, run_directory: Path, *, check_allowed: Callable[[], None] = lambda: None
) -> None:
    """Write the frozen weights of a run's first state into its directory, if they are quantized."""
    if program.config.quantization is None:
        return
    with closing(base_storage(program, run_directory, check_allowed=check_allowed)) as storage:
        if jax.process_index() == 0:
            storage.checkpoints.recover_interrupted(lambda step, why: None)
            if storage.steps:  # of a session that ended before its first checkpoint
                storage.checkpoints.remove(0)
        storage.save(frozen_only(state), step=0, data={"origin": program.origin})


def restore_frozen(program: Program, state: TrainState, run_directory: Path, *, origin: str | None) -> TrainState:
    """Add the frozen weights to a restored state. Raises UserError if the quantized base is missing or damaged."""
    if program.config.quantization is None:
        return program.restore_frozen(state, origin=origin)
    with closing(base_storage(program, run_directory)) as storage:
        if not storage.steps:
            raise UserError(
                f"{run_directory / DIRECTORY}: the quantized base is missing; bring it back, or train under another "
                "name"
            )
        try:
            base, _ = storage.restore(0, shapes=frozen_only(program.shapes), shardings=frozen_only(program.shardings))
        except DamagedCheckpoint as error:
            raise UserError(
                f"{error}; bring a good copy of {run_directory / DIRECTORY} back, or train under another name"
            ) from None
    if "teacher" not in program.shapes.frozen:
        return replace(state, frozen=base.params)
    teacher = program.restore_frozen(state, origin=origin).frozen["teacher"]  # read again from its own directory
    return replace(state, frozen=base.params | {"teacher": teacher})


def base_storage(program: Program, run_directory: Path, *, check_allowed: Callable[[], None] = lambda: None) -> Storage:
    """Open the storage of the base, whose layers are in run order."""
    return Storage(
        run_directory / DIRECTORY, layout=make_layout(program.config.model, program.order), check_allowed=check_allowed
    )


def frozen_only(state: Any) -> Any:
    """Return a state (or shapes, or shardings) that holds the frozen weights of the quantized model only."""
    return replace(state, params=without_teacher(state.frozen), frozen={}, opt_state=(), outer=())
