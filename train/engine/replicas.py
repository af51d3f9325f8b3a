"""Replicas that train by themselves: a run of one, lifted over a leading [replica], cut by the mesh axis `replica`.

    replicas = replicas_of(config, mesh)            None where there is one
    replicas.initial(state)                         one replica's first state -> everybody's, and the outer state
    replicas.step(step)(state, batch)               everybody's inner step: no message between replicas
    replicas.compiled_meetings(...)(state, update)  what is due after update number `update`

`params` and `opt_state` have the leading [replica], counters too; `frozen`, `step` and `rng` have not; `outer` has it
where each replica keeps an outer state of its own. Replica r trains on the r-th of R equal parts of the global batch.
The lift is a plain `jax.vmap`, so that nothing in a step crosses the axis; meetings are programs of their own, which
the host calls when they are due. Metrics of a step stay [replica] and are put together on the host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...parallel import layout
from ...parallel.gradients import Batch
from ...parallel.outer import registry
from ...parallel.outer.exchange import REPLICA_AXIS, WireNames, make_exchange
from ...parallel.outer.interface import Exchange, OuterOptimizer, OuterStep
from ...parallel.outer.matchings import matching_for_round
from ...parallel.sharding import optimizer_shardings
from ...parallel.state import TrainState
from . import compile_cache
from .step import Step

Evaluate = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]
Synchronize = Callable[[TrainState, int], TrainState]


@dataclass(frozen=True)
class Replicas:
    """How a run of one becomes a run of `count`."""

    count: int
    outer: OuterOptimizer
    mesh: Mesh
    seed: int  # of the pairs
    outer_on_host: bool  # whether the outer state waits in the host's memory

    def initial(self, state: TrainState) -> TrainState:
        """Everybody begins at the same parameters."""
        copies = lambda tree: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), tree)
        outer = self.outer.init(state.params)
        return dataclasses.replace(
            state,
            params=copies(state.params),
            opt_state=copies(state.opt_state),
            outer=copies(outer) if self.outer.per_replica else outer,
        )

    def shardings(self, one: TrainState, params: Any) -> TrainState:
        """From where one replica's arrays live, and the shapes of its parameters, to where everybody's do."""
        outer = optimizer_shardings(jax.eval_shape(self.outer.init, params), params, mesh=self.mesh)
        if self.outer.per_replica:
            outer = shard_over_replicas(outer)
        if self.outer_on_host:
            outer = jax.tree.map(lambda where: where.with_memory_kind("pinned_host"), outer)
        return dataclasses.replace(
            one, params=shard_over_replicas(one.params), opt_state=shard_over_replicas(one.opt_state), outer=outer
        )

    def step(self, step: Step) -> Step:
        """`step` of every replica on its own rows, which keep the numbers they have in the global batch."""

        def inner(params: Any, opt_state: Any, batch: Batch, first: jax.Array, state: TrainState):
            new, metrics = step(dataclasses.replace(state, params=params, opt_state=opt_state), batch, first)
            return new.params, new.opt_state, new.step, metrics

        def lifted(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
            parts = self.split_rows(batch)
            rows = parts["tokens"].shape[1]
            params, opt_state, counts, metrics = jax.vmap(inner, (0, 0, 0, 0, None))(
                state.params,
                state.opt_state,
                parts,
                jnp.arange(self.count) * rows,
                dataclasses.replace(state, outer=()),
            )
            del counts  # all alike; the one below crosses nothing
            return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics

        return lifted

    def evaluate(self, evaluate: Evaluate) -> Evaluate:
        """`evaluate` of one set of parameters, each replica on its own rows of the batch."""

        def lifted(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            sums = jax.vmap(evaluate, (None, None, 0))(params, frozen, self.split_rows(batch))
            return tuple(jnp.sum(one) for one in sums)

        return lifted

    def split_rows(self, batch: Batch) -> Batch:
        """[global_batch, ...] -> [replica, rows, ...]."""
        return {field: leaf.reshape(self.count, -1, *leaf.shape[1:]) for field, leaf in batch.items()}

    def parameters(self, state: TrainState) -> Any:
        """The outer parameters, without [replica], in the dtype of the inner ones: what the run is."""
        found = self.outer.eval_params(state.params, self.outer_on_device(state.outer))
        return jax.tree.map(lambda mean, own: mean.astype(own.dtype), found, state.params)

    def replica_spread(self, state: TrainState) -> dict[str, float]:
        """replica_spread: a parameter's standard deviation over the replicas over its size, both root mean squares."""

        def squares(params: Any) -> tuple[jax.Array, jax.Array]:
            leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
            return sum(leaf.var(axis=0).sum() for leaf in leaves), sum((leaf**2).mean(axis=0).sum() for leaf in leaves)

        repeated = NamedSharding(self.mesh, PartitionSpec())
        between, whole = jax.jit(squares, out_shardings=(repeated, repeated))(state.params)
        return {"replica_spread": float(jnp.sqrt(between / whole))}

    def canonical(self, state: TrainState, model: ModelConfig, order: layout.LayerOrder = None) -> dict[str, jax.Array]:
        """Parameters, optimizer state and outer state by canonical name, what differs between replicas under theirs."""
        several = {"params": state.params, "opt_state": state.opt_state}
        one = {"outer": state.outer}
        if self.outer.per_replica:
            several, one = several | one, {}
        return layout.to_canonical_replicas(several, model, replicas=self.count, order=order) | layout.to_canonical(
            one, model, order
        )

    def outer_on_device(self, outer: Any) -> Any:
        """The outer state in the device's memory; for use in a compiled function."""
        return jax.device_put(outer, jax.memory.Space.Device) if self.outer_on_host else outer

    def compiled_synchronization(self, shapes: TrainState, shardings: TrainState) -> Synchronize:
        """`meet(state, update)` runs what is due after update number `update`; it consumes the state it is given."""
        compiled = {
            meeting.name: self.compile_outer_step(meeting, shapes, shardings) for meeting in self.outer.outer_steps
        }

        def meet(state: TrainState, update: int) -> TrainState:
            for meeting in self.outer.outer_steps:
                if meeting.is_due(update):
                    row = matching_for_round(update, replicas=self.count, seed=self.seed)
                    params, outer = compiled[meeting.name](state.params, state.outer, np.int32(row))
                    state = dataclasses.replace(state, params=params, outer=outer)
            return state

        return meet

    def compile_outer_step(self, meeting: OuterStep, shapes: TrainState, shardings: TrainState) -> jax.stages.Compiled:
        """The program of one meeting, by whom nothing but parameters and outer state is read."""
        where = (shardings.params, shardings.outer)
        given = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (shapes.params, shapes.outer),
            where,
        )
        row = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))

        def run(params: Any, outer: Any, row: jax.Array) -> tuple[Any, Any]:
            return meeting.run(params, self.outer_on_device(outer), row)

        with jax.set_mesh(self.mesh):
            jitted = jax.jit(run, out_shardings=where, donate_argnums=(0, 1))
            return compile_cache.compile_cached(jitted.lower(*given, row), self.mesh)


def make_replicas(
    config: RunConfig, mesh: Mesh, *, count: int | None = None, order: layout.LayerOrder = None
) -> Replicas | None:
    """The replicas of `config` on `mesh`; `count` where the mesh is smaller than the run's. None: a run of one.

    `order` is that of the layers in the run's stacks.
    """
    count = count or mesh.shape[REPLICA_AXIS]
    if count == 1:
        return None

    def exchange_factory(wire: WireNames) -> Exchange:
        return make_exchange(wire, replicas=count, mesh=mesh)

    outer = registry.build_outer_optimizer(
        config.outer, model=config.model, exchange_factory=exchange_factory, replicas=count, order=order
    )
    return Replicas(count, outer, mesh, config.seed, config.outer.memory == "host")


def shard_over_replicas(shardings: Any) -> Any:
    """The shardings of arrays with a leading [replica], from those without it."""
    return jax.tree.map(lambda one: NamedSharding(one.mesh, PartitionSpec(REPLICA_AXIS, *one.spec)), shardings)


def metrics_to_host(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics of a step as numbers: those of the replicas this process holds, put together.

    The loss is weighted by tokens, which add up, any update skipped counts, and the rest are means.
    """
    seen = {name: addressable(array) for name, array in metrics.items()}
    tokens = seen["tokens"]
    together = {"tokens": np.sum, "skipped": np.max}
    values = {name: float(together.get(name, np.mean)(array)) for name, array in seen.items()}
    if tokens.sum() > 0:
        values["loss"] = float(np.sum(seen["loss"] * tokens) / tokens.sum())
    return values


def addressable(array: jax.Array) -> np.ndarray:
    """What this process holds of an array [replica] or [], each element once; waits for it."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    parts = {str(shard.index): shard.data for shard in array.addressable_shards}
    return np.concatenate([np.atleast_1d(jax.device_get(part)) for part in parts.values()])
