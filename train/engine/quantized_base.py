"""The quantized base of a run, kept once beside its checkpoints: they hold the adapter, this the weights it belongs to.

Quantizing anew, on another mesh or by another version, may round a weight the other way: then it is another base. Runs
whose frozen weights are not quantized make them again exactly, from the seed or from `model.from`.
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


def save_base(program: Program, state: TrainState, run: Path, *, allowed: Callable[[], None] = lambda: None) -> None:
    """Write the frozen weights of `state`, with which `run` starts, into it, where they are quantized."""
    if program.config.quantization is None:
        return
    with closing(base_storage(program, run, allowed=allowed)) as storage:
        if jax.process_index() == 0:
            storage.checkpoints.recover_interrupted(lambda step, why: None)
            if storage.steps:  # of a sitting that came to no checkpoint
                storage.checkpoints.remove(0)
        storage.save(frozen_only(state), step=0, data={"origin": program.origin})


def restore_frozen(program: Program, state: TrainState, run: Path, *, origin: str | None) -> TrainState:
    """`state`, as a checkpoint of `run` holds it, with what never changes. Raises UserError where that is gone."""
    if program.config.quantization is None:
        return program.restore_frozen(state, origin=origin)
    with closing(base_storage(program, run)) as storage:
        if not storage.steps:
            raise UserError(
                f"{run / DIRECTORY}: the quantized base is gone; bring it back, or train under another name"
            )
        try:
            one, _ = storage.restore(0, shapes=frozen_only(program.shapes), shardings=frozen_only(program.shardings))
        except DamagedCheckpoint as error:
            raise UserError(
                f"{error}; bring a good copy of {run / DIRECTORY} back, or train under another name"
            ) from None
    if "teacher" not in program.shapes.frozen:
        return replace(state, frozen=one.params)
    again = program.restore_frozen(state, origin=origin).frozen  # the whole model is where it came from
    return replace(state, frozen=one.params | {"teacher": again["teacher"]})


def base_storage(program: Program, run: Path, *, allowed: Callable[[], None] = lambda: None) -> Storage:
    """Where the base is; its layers stand as in the run."""
    return Storage(run / DIRECTORY, layout=make_layout(program.config.model, program.order), check_allowed=allowed)


def frozen_only(state: Any) -> Any:
    """A state (or shapes, or shardings) of the frozen weights of the quantized model and nothing else."""
    return replace(state, params=without_teacher(state.frozen), frozen={}, opt_state=(), outer=())
