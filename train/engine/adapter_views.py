"""One of several adapters as a run of its own: its program and its state, taken out of the run that trains them all.

program, state = extract_adapter(program, state, "code")      to generate, merge and export as in any run
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from ...configs.adapter_runs import single_adapter_run
from ...models.adapters.multi_lora import slice_adapter
from ...parallel.sharding import map_with_path, path_name
from ...parallel.state import TrainState
from ..data.assemble import Data
from .program import Program, build


def extract_adapter(program: Program, state: TrainState, name: str) -> tuple[Program, TrainState]:
    """Return the program of the run of adapter `name` alone, on the same mesh, and its state."""
    single = build(single_adapter_run(program.config, name), program.mesh)
    with jax.set_mesh(program.mesh):
        return single, slice_state(state, single.shapes, number=list(program.config.adapters).index(name))


def per_adapter(program: Program, state: TrainState, data: Data) -> Iterator[tuple[str, Program, TrainState, Data]]:
    """Yield (metric prefix, program, state, data) for each adapter; for a run with at most one, its own with ""."""
    if not program.config.adapters:
        yield "", program, state, data
    for name in program.config.adapters:
        held_out = None if data.held_out is None else data.held_out.datasets[name]
        yield f"{name}/", *extract_adapter(program, state, name), dataclasses.replace(data, held_out=held_out)


def slice_state(state: TrainState, like: TrainState, *, number: int) -> TrainState:
    """Return the state of adapter `number`, with the shapes of `like`; the base in it is the same arrays."""

    def slice_part(part: str) -> Any:
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, part))}

        def slice_leaf(name: str, like: Any) -> jax.Array:
            if part == "frozen" and "/adapter/" not in name:
                return leaves[name]
            return slice_adapter(leaves[name], like, adapter_id=number, axis=1 if part == "frozen" else 0)

        return map_with_path(slice_leaf, getattr(like, part))

    return dataclasses.replace(state, **{part: slice_part(part) for part in ("params", "frozen", "opt_state")})
