"""One of several adapters, taken out of the run of all: the program and the state of the run it would be alone.

program, state = parted(program, state, "code")      to generate, merge and export as of any run
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from ...configs.adapter_runs import alone
from ...models.adapters.multi_lora import slice_adapter
from ...parallel.sharding import path_name
from ...parallel.state import TrainState
from ..data.assemble import Data
from .program import Program, build


def extract_adapter(program: Program, state: TrainState, name: str) -> tuple[Program, TrainState]:
    """The run of the adapter `name` alone, on the same mesh, and its state in the run of all."""
    one = build(alone(program.config, name), program.mesh)
    with jax.set_mesh(program.mesh):
        return one, slice_state(state, one.shapes, number=list(program.config.adapters).index(name))


def per_adapter(program: Program, state: TrainState, data: Data) -> Iterator[tuple[str, Program, TrainState, Data]]:
    """Of each adapter what stands before the names of its numbers, program, state and data; the run's own where it has
    not several."""
    if not program.config.adapters:
        yield "", program, state, data
    for name in program.config.adapters:
        held_out = None if data.held_out is None else data.held_out.each[name]
        yield f"{name}/", *extract_adapter(program, state, name), dataclasses.replace(data, held_out=held_out)


def slice_state(state: TrainState, like: TrainState, *, number: int) -> TrainState:
    """The state of the run of adapter `number` alone, whose shapes are `like`; the base in it is the same arrays."""
    held = {
        part: {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, part))}
        for part in ("params", "frozen", "opt_state")
    }

    def leaf(part: str, path: Any, like: Any) -> jax.Array:
        found = held[part][path_name(path)]
        if part == "frozen" and "/adapter/" not in path_name(path):
            return found
        return slice_adapter(found, like, adapter_id=number, axis=1 if part == "frozen" else 0)

    parts = {part: jax.tree_util.tree_map_with_path(partial(leaf, part), getattr(like, part)) for part in held}
    return dataclasses.replace(state, **parts)
