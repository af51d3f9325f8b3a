"""From a host's rows to global arrays on the mesh."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from ...configs.run import RunConfig
from ...parallel.attention import token_order
from ...parallel.sharding import batch_shardings
from ..objectives import registry
from .program import Program


def local_rows(config: RunConfig, mesh: Mesh) -> slice:
    """The rows of every global batch that this process's devices hold."""
    shape = (config.data.global_batch, config.data.sequence_length)
    indices = batch_shardings(mesh)["tokens"].addressable_devices_indices_map(shape).values()
    bounds = [index[0].indices(shape[0])[:2] for index in indices]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


@dataclass(frozen=True)
class ProcessShard:
    """Which samples of the data are read here: of each `every`, the `job`'s, and of those this process's `rows`."""

    run_batch: int  # samples of an update of the whole run, islands and all
    job_rows: range
    rows: slice  # of the `every`

    def first_sample(self, update: int) -> int:
        """The number of this process's first sample of the update after `update` others."""
        return update * self.run_batch + self.rows.start

    def samples(self, start: int, stop: int) -> Iterable[int]:
        """The job's samples of the updates after `start` others and before `stop`."""
        return (update * self.run_batch + row for update in range(start, stop) for row in self.job_rows)


def make_process_shard(program: Program) -> ProcessShard:
    """This process's share of what the run reads."""
    size, islands = program.config.data.global_batch, program.config.islands
    every = size * (islands.count if islands else 1)
    rows, job = local_rows(program.config, program.mesh), islands.rows(every) if islands else range(every)
    return ProcessShard(every, job, slice(job.start + rows.start, job.start + rows.stop))


def make_global_arrays(
    batch: Mapping[str, np.ndarray], config: RunConfig, mesh: Mesh, *, fields: Iterable[str] | None = None
) -> dict[str, jax.Array]:
    """Global arrays [global_batch, sequence, ...] from this process's `local_rows` of `fields`; None: the recipe's.

    Where `seq` cuts the rows, tokens are dealt to its devices in the order the attention wants, in every field alike.
    """
    shape = (config.data.global_batch, config.data.sequence_length)
    order = token_order(shape[1], mesh=mesh, strategy=config.sequence.parallel)
    first = local_rows(config, mesh).start

    def place(field: str, sharding: jax.sharding.NamedSharding) -> jax.Array:
        rows = batch[field] if order is None else batch[field][:, order]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return rows[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((*shape, *rows.shape[2:]), sharding, part)

    wanted = batch_shardings(mesh, registry.batch_fields(config) if fields is None else fields)
    return {field: place(field, sharding) for field, sharding in wanted.items()}
