"""Replicas train by themselves and synchronize now and then; their arrays have a leading [replica] dimension.

    replicas = make_replicas(config, mesh)                  None if there is one replica
    replicas.initial(state)                                 first state of one replica -> of all, with the outer state
    replicas.step(step)(state, batch)                       inner step of all replicas, without communication
    replicas.compiled_synchronization(...)(state, step)     the outer steps that are due after `step`

The leading dimension is sharded over the mesh axis `replica`. `params` and `opt_state` have it, counters included;
`frozen`, `step` and `rng` do not; `outer` has it if each replica keeps an outer state of its own. Replica r trains on
the r-th of R equal parts of the global batch. The inner step is a plain `jax.vmap` over [replica], so nothing in it
crosses the axis. Outer steps are programs of their own, which the host calls when they are due. The metrics of a step
stay [replica] and are reduced on the host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...configs.sections.parallel import MeshConfig
from ...parallel import layout
from ...parallel.compiler_options import compiler_options
from ...parallel.gradients import Batch
from ...parallel.outer import registry
from ...parallel.outer.exchange import REPLICA_AXIS, WireNames, make_exchange
from ...parallel.outer.interface import Exchange, OuterOptimizer, OuterStep
from ...parallel.outer.matchings import matching_for_round
from ...parallel.sharding import optimizer_shardings, with_shardings
from ...parallel.state import TrainState
from . import compile_cache
from .step import Step

Evaluate = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight
Synchronize = Callable[[TrainState, int], TrainState]  # (state, step just made) -> state


@dataclass(frozen=True)
class Replicas:
    """How a run of one replica becomes a run of `count`."""

    count: int
    outer: OuterOptimizer
    mesh: Mesh
    matching_seed: int  # random pairs of replicas follow from it
    outer_on_host: bool  # whether the outer state stays in host memory between outer steps
    mesh_config: MeshConfig

    def initial(self, state: TrainState) -> TrainState:
        """Return the first state of all replicas, which start from the same parameters."""
        replicate = lambda tree: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), tree)
        outer = self.outer.init(state.params)
        return dataclasses.replace(
            state,
            params=replicate(state.params),
            opt_state=replicate(state.opt_state),
            outer=replicate(outer) if self.outer.per_replica else outer,
        )

    def shardings(self, single: TrainState, params: Any) -> TrainState:
        """Return the shardings of all replicas' state, from those of one replica and the shapes of its parameters."""
        outer = optimizer_shardings(jax.eval_shape(self.outer.init, params), params, mesh=self.mesh)
        if self.outer.per_replica:
            outer = shard_over_replicas(outer)
        return dataclasses.replace(
            single,
            params=shard_over_replicas(single.params),
            opt_state=shard_over_replicas(single.opt_state),
            outer=in_host_memory(outer) if self.outer_on_host else outer,
        )

    def step(self, step: Step) -> Step:
        """`step` of every replica on its own rows, which keep their ids in the global batch."""

        def single_step(params: Any, opt_state: Any, batch: Batch, first_row: jax.Array, state: TrainState):
            new, metrics = step(dataclasses.replace(state, params=params, opt_state=opt_state), batch, first_row)
            return new.params, new.opt_state, metrics

        def step_all(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
            batches = self.split_rows(batch)
            first_rows = jnp.arange(self.count) * batches["tokens"].shape[1]
            params, opt_state, metrics = jax.vmap(single_step, (0, 0, 0, 0, None))(
                state.params, state.opt_state, batches, first_rows, dataclasses.replace(state, outer=())
            )
            return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), metrics

        return step_all

    def evaluate(self, evaluate: Evaluate) -> Evaluate:
        """`evaluate` of one set of parameters, each replica on its own rows of the batch."""

        def evaluate_all(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            numerators, weights = jax.vmap(evaluate, (None, None, 0))(params, frozen, self.split_rows(batch))
            return jnp.sum(numerators), jnp.sum(weights)

        return evaluate_all

    def split_rows(self, batch: Batch) -> Batch:
        """Reshape fields [global_batch, ...] into [replica, rows, ...]."""
        return {field: leaf.reshape(self.count, -1, *leaf.shape[1:]) for field, leaf in batch.items()}

    def eval_params(self, state: TrainState) -> Any:
        """Return the outer parameters without [replica], in the dtype of the inner ones."""
        return optax.tree.cast_like(
            self.outer.eval_params(state.params, self.outer_on_device(state.outer)), state.params
        )

    def replica_spread(self, state: TrainState) -> dict[str, float]:
        """Metric replica_spread: standard deviation over replicas / size of the parameters, both root mean squares."""

        def squares(params: Any) -> tuple[jax.Array, jax.Array]:
            leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
            return sum(leaf.var(axis=0).sum() for leaf in leaves), sum((leaf**2).mean(axis=0).sum() for leaf in leaves)

        replicated = NamedSharding(self.mesh, PartitionSpec())
        variance, size = jax.jit(squares, out_shardings=(replicated, replicated))(state.params)
        return {"replica_spread": float(jnp.sqrt(variance / size))}

    def canonical(self, state: TrainState, model: ModelConfig, order: layout.LayerOrder = None) -> dict[str, jax.Array]:
        """Return parameters, optimizer state and outer state by canonical name; replicas have names of their own."""
        per_replica, shared = {"params": state.params, "opt_state": state.opt_state}, {"outer": state.outer}
        if self.outer.per_replica:
            per_replica, shared = per_replica | shared, {}
        arrays = layout.to_canonical_replicas(per_replica, model, replicas=self.count, order=order)
        return arrays | layout.to_canonical(shared, model, order)

    def outer_on_device(self, outer: Any) -> Any:
        """Move the outer state to device memory, inside a compiled function."""
        return jax.device_put(outer, jax.memory.Space.Device) if self.outer_on_host else outer

    def compiled_synchronization(self, shapes: TrainState, shardings: TrainState) -> Synchronize:
        """Compile every outer step; return `synchronize(state, step)`, which runs those due and donates its state."""
        outer_steps = [
            (outer_step, self.compile_outer_step(outer_step, shapes, shardings))
            for outer_step in self.outer.outer_steps
        ]

        def synchronize(state: TrainState, step: int) -> TrainState:
            for outer_step, compiled in outer_steps:
                if outer_step.is_due(step):
                    row = matching_for_round(step, replicas=self.count, seed=self.matching_seed)
                    params, outer = compiled(state.params, state.outer, np.int32(row))
                    state = dataclasses.replace(state, params=params, outer=outer)
            return state

        return synchronize

    def compile_outer_step(
        self, outer_step: OuterStep, shapes: TrainState, shardings: TrainState
    ) -> jax.stages.Compiled:
        """Compile (params, outer, row of the matchings) -> (params, outer)."""
        out_shardings = (shardings.params, shardings.outer)
        arguments = with_shardings((shapes.params, shapes.outer), out_shardings)
        row = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))

        def run(params: Any, outer: Any, row: jax.Array) -> tuple[Any, Any]:
            return outer_step.run(params, self.outer_on_device(outer), row)

        with jax.set_mesh(self.mesh):
            jitted = jax.jit(run, out_shardings=out_shardings, donate_argnums=(0, 1))
            return compile_cache.compile_cached(
                jitted.lower(*arguments, row), self.mesh, options=compiler_options(self.mesh_config, self.mesh)
            )


def make_replicas(
    config: RunConfig, mesh: Mesh, *, count: int | None = None, order: layout.LayerOrder = None
) -> Replicas | None:
    """Return the replicas of `config` on `mesh`; None for a run of one replica.

    `count` replaces the size of the mesh axis, for a mesh without the axis. `order` is the run order of the layers.
    """
    count = count or mesh.shape[REPLICA_AXIS]
    if count == 1:
        return None

    def exchange_factory(wire: WireNames) -> Exchange:
        return make_exchange(wire, replicas=count, mesh=mesh)

    outer = registry.build_outer_optimizer(
        config.outer, model=config.model, exchange_factory=exchange_factory, replicas=count, order=order
    )
    return Replicas(count, outer, mesh, config.seed, config.outer.memory == "host", config.mesh)


def shard_over_replicas(shardings: Any) -> Any:
    """Add a leading [replica], sharded over `replica`, to the shardings of one replica's arrays."""
    return jax.tree.map(lambda leaf: NamedSharding(leaf.mesh, PartitionSpec(REPLICA_AXIS, *leaf.spec)), shardings)


def in_host_memory(shardings: Any) -> Any:
    """The same shardings in the pinned memory of the host."""
    return jax.tree.map(lambda leaf: leaf.with_memory_kind("pinned_host"), shardings)


def metrics_to_host(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Reduce the metrics of a step over the replicas that this process holds; waits for the device.

    Tokens are summed, `skipped` is 1 if any replica skipped, the loss is weighted by tokens, the others are means.
    """
    arrays = {name: addressable(array) for name, array in metrics.items()}
    tokens, reductions = arrays["tokens"], {"tokens": np.sum, "skipped": np.max}
    values = {name: float(reductions.get(name, np.mean)(array)) for name, array in arrays.items()}
    if tokens.sum() > 0:
        values["loss"] = float(np.sum(arrays["loss"] * tokens) / tokens.sum())
    return values


def addressable(array: jax.Array) -> np.ndarray:
    """Return the elements of an array [replica] or [] that this process holds, each once; waits for the device."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    parts = {str(shard.index): shard.data for shard in array.addressable_shards}
    return np.concatenate([np.atleast_1d(jax.device_get(part)) for part in parts.values()])
