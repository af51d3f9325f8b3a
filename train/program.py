"""From configuration and mesh to compiled programs: how the state is born, where it lives, the step, the evaluation.

program = build(config, mesh)
state = program.initialized()
step = program.compiled_step()          # ahead of time; its plan can be read before anything runs
state, metrics = step(state, batch)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..configs.names import BATCH_FIELDS
from ..configs.run import RunConfig
from ..memory import policy
from ..models.context import Context, flat_linear, linear
from ..models.decoder import graph, initial_params
from ..parallel.attention import sharded_attention, token_order
from ..parallel.layout import run_shapes
from ..parallel.lowcomm.bytes import Traffic, traffic
from ..parallel.rules import batch_shardings, constrainer, optimizer_shardings, weight_shardings
from ..parallel.state import TrainState
from ..parallel.vocabulary import lookup
from . import optimizers
from .gradients import Batch, accumulated, plain
from .recipes.registry import RECIPES
from .replicas import Meet, Replicas, replicas_of
from .step import Step, make_loss, make_step

# Dtypes of a batch's fields; all are [global_batch, sequence].
BATCH_DTYPES = dict.fromkeys(BATCH_FIELDS, jnp.int32) | {"loss_weights": jnp.float32}


@dataclass(frozen=True)
class Program:
    """Everything that is computed on devices, for one configuration on one mesh."""

    config: RunConfig
    mesh: Mesh
    graph: Any  # the model's structure
    optimizer: optax.GradientTransformation
    step: Step  # (state, batch) -> (state, metrics)
    evaluate: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight
    replicas: Replicas | None = None  # where several train by themselves

    def initial(self) -> TrainState:
        """The state before step 0, as a pure function of the seed."""
        return self.replicas.initial(self._one()) if self.replicas else self._one()

    def _one(self) -> TrainState:
        """`initial` of one replica."""
        key = jax.random.key(self.config.seed)
        params = initial_params(self.config.model, key, jnp.dtype(self.config.precision.parameters))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen={},
            opt_state=self.optimizer.init(params),
            outer=(),
            rng=jax.random.key_data(jax.random.fold_in(key, 1)),
        )

    @cached_property
    def shapes(self) -> TrainState:
        """The state's shapes and dtypes; allocates nothing."""
        return jax.eval_shape(self.initial)

    @cached_property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        repeated = NamedSharding(self.mesh, PartitionSpec())
        zero = self.config.mesh.zero
        shapes = jax.eval_shape(self._one)
        one = TrainState(
            step=repeated,
            params=weight_shardings(shapes.params, mesh=self.mesh, zero=zero),
            frozen=weight_shardings(shapes.frozen, mesh=self.mesh, zero=zero),
            opt_state=optimizer_shardings(shapes.opt_state, shapes.params, mesh=self.mesh),
            outer=(),
            rng=repeated,
        )
        return self.replicas.shardings(one, shapes.params) if self.replicas else one

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of one global batch."""
        shape = (self.config.data.global_batch, self.config.data.sequence_length)
        shardings = batch_shardings(self.mesh)
        return {
            field: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[field])
            for field, dtype in BATCH_DTYPES.items()
        }

    def initialized(self) -> TrainState:
        """The state before step 0, born sharded."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self.initial, out_shardings=self.shardings)()

    def compiled_step(self) -> jax.stages.Compiled:
        """The training step, compiled; it consumes the state it is given."""
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.step, out_shardings=(self.shardings, None), donate_argnums=0)
            return jitted.lower(self._abstract_state(), self.batch_shapes).compile()

    def compiled_meetings(self) -> Meet:
        """`meet(state, update)`: what replicas do after update number `update`; a run of one does nothing."""
        if self.replicas is None:
            return lambda state, update: state
        return self.replicas.compiled_meetings(self.shapes, self.shardings)

    def compiled_evaluation(self) -> jax.stages.Compiled:
        """Loss sums of a batch, compiled, for parameters as `evaluated` gives them."""
        frozen = self._abstract_state().frozen
        with jax.set_mesh(self.mesh):
            return jax.jit(self.evaluate).lower(self._abstract_params(), frozen, self.batch_shapes).compile()

    def evaluated(self, state: TrainState) -> Any:
        """The parameters to evaluate, sample from and export: the outer ones, an average where one is kept, or all."""
        return self._evaluated(state) if self._evaluated else state.params

    @cached_property
    def _evaluated(self) -> Callable[[TrainState], Any] | None:
        if not self.replicas and "average" not in self.shapes.opt_state:
            return None
        where = jax.tree.map(lambda leaf: leaf.sharding, self._abstract_params())
        return jax.jit(self.replicas.parameters if self.replicas else averaged, out_shardings=where)

    @cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """What each replica sends, and when; nothing in a run of one."""
        if not self.replicas:
            return ()
        return traffic(
            self.config.outer, self.array_shapes, layers=self.config.model.layers, replicas=self.replicas.count
        )

    @cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one replica's every parameter, by canonical name."""
        return run_shapes(self._abstract_params(), self.config.model)

    def _abstract_params(self) -> Any:
        """One replica's parameters, and where they live."""
        shapes = jax.eval_shape(self._one).params
        return jax.tree.map(placed, shapes, weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero))

    def _abstract_state(self) -> TrainState:
        return jax.tree.map(placed, self.shapes, self.shardings)


def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `leaf`, at `sharding`."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def averaged(state: TrainState) -> Any:
    """The moving average of the parameters, in their dtype."""
    return jax.tree.map(lambda mean, own: mean.astype(own.dtype), state.opt_state["average"].params, state.params)


def build(config: RunConfig, mesh: Mesh, *, replica_count: int | None = None) -> Program:
    """Compose recipe, model, memory policy, gradient engine, optimizer and outer optimizer. Allocates nothing.

    `replica_count` is for a mesh that is not the run's own: replicas that it has no axis for are on every device.
    """
    structure = graph(config.model)
    loss = make_loss(
        structure,
        RECIPES[config.recipe.name],
        model=config.model,
        memory=config.memory,
        context=partial(context, config, mesh),
    )
    schedule = optimizers.schedule(config.optimizer, steps=config.steps)
    optimizer = optimizers.build(config.optimizer, steps=config.steps, spike=config.logging.spike)
    engine = accumulated(plain(loss, dtype=jnp.dtype(config.precision.gradients)), microbatches=config.microbatches)
    step = make_step(engine, optimizer, schedule=schedule, dropout=config.model.dropout > 0, spike=config.logging.spike)

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        numerator, (weight, _) = loss(params, frozen, batch, None)
        return numerator, weight

    several = replicas_of(config, mesh, count=replica_count)
    if several:
        step, evaluate = several.step(step), several.evaluate(evaluate)
    return Program(config, mesh, structure, optimizer, step, evaluate, several)


def context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """What the blocks are told for one batch on one mesh."""
    chosen = policy.decisions(config.memory, tensors=policy.emitted(config.model))
    constrain = constrainer(mesh)
    order = token_order(batch["tokens"].shape[1], mesh=mesh, strategy=config.sequence.parallel)
    return Context(
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        index=None if order is None else jnp.asarray(order),
        dropout_keys=keys,
        attend=sharded_attention(config.model.attention, mesh=mesh, strategy=config.sequence.parallel),
        linear=flat_linear if mesh.shape["seq"] == 1 else linear,
        lookup=partial(lookup, constrain=constrain),
        constrain=constrain,
        remat=policy.rematerialized(chosen, scanned=config.model.scan),
        compute=jnp.dtype(config.precision.compute),
    )
