"""From the rows that a process reads to global arrays on the mesh."""

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
    """Return the rows of every global batch of this job that the devices of this process hold."""
    shape = (config.data.global_batch, config.data.sequence_length)
    indices = batch_shardings(mesh)["tokens"].addressable_devices_indices_map(shape).values()
    bounds = [index[0].indices(shape[0])[:2] for index in indices]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


@dataclass(frozen=True)
class ProcessShard:
    """Which samples of the data this process reads."""

    run_batch: int  # samples of one step of the whole run, all islands included
    job_rows: range  # those of `run_batch` that this job reads
    rows: slice  # those of `run_batch` that this process reads

    def first_sample(self, step: int) -> int:
        """The number of this process's first sample after `step` steps."""
        return step * self.run_batch + self.rows.start

    def samples(self, start: int, stop: int) -> Iterable[int]:
        """The numbers of the job's samples after `start` steps, up to step `stop`."""
        return (step * self.run_batch + row for step in range(start, stop) for row in self.job_rows)


def make_process_shard(program: Program) -> ProcessShard:
    """Return the shard of this process."""
    islands = program.config.islands
    run_batch = program.config.data.global_batch * (islands.count if islands else 1)
    job_rows = islands.local_rows(run_batch) if islands else range(run_batch)
    rows = local_rows(program.config, program.mesh)
    return ProcessShard(run_batch, job_rows, slice(job_rows.start + rows.start, job_rows.start + rows.stop))


def make_global_arrays(
    batch: Mapping[str, np.ndarray], config: RunConfig, mesh: Mesh, *, fields: Iterable[str] | None = None
) -> dict[str, jax.Array]:
    """Make global arrays [global_batch, sequence, ...] from this process's `local_rows` of a batch.

    `fields` are those to make; None: all that the recipe reads. If `seq` shards the rows, the tokens of every field are
    permuted into the order that the attention strategy needs.
    """
    shape = (config.data.global_batch, config.data.sequence_length)
    order = token_order(shape[1], mesh=mesh, strategy=config.sequence.parallel)
    first_row = local_rows(config, mesh).start

    def make_global_array(field: str, sharding: jax.sharding.NamedSharding) -> jax.Array:
        rows = batch[field] if order is None else batch[field][:, order]

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return rows[start - first_row : stop - first_row, index[1]]

        return jax.make_array_from_callback((*shape, *rows.shape[2:]), sharding, shard)

    shardings = batch_shardings(mesh, registry.batch_fields(config) if fields is None else fields)
    return {field: make_global_array(field, sharding) for field, sharding in shardings.items()}
