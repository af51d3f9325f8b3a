"""From configuration and mesh to compiled programs: how the state is born, where it lives, the step, the evaluation.

program = build(config, mesh)
state = program.initialized()
step = program.compiled_step()          # ahead of time; its plan can be read before anything runs
state, metrics = step(state, batch)
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..checkpoint import huggingface
from ..configs.errors import UserError
from ..configs.names import BATCH_FIELDS
from ..configs.run import RunConfig
from ..memory import policy
from ..models.adapters.attach import attached, split, started
from ..models.adapters.selection import multipliers
from ..models.context import Context, flat_linear, linear
from ..models.decoder import graph, initial_params
from ..parallel.attention import sharded_attention, token_order
from ..parallel.rules import batch_shardings, constrainer, optimizer_shardings, weight_shardings
from ..parallel.state import TrainState
from ..parallel.vocabulary import lookup
from . import optimizers
from .gradients import Batch, accumulated, plain
from .recipes.registry import RECIPES
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

    def initial(self, weights: Any = None) -> TrainState:
        """The state before step 0, as a pure function of the seed and of the `weights` it starts from, if any."""
        key = jax.random.key(self.config.seed)
        params, frozen = self.divided(self.fresh() if weights is None else weights)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=frozen,
            opt_state=self.optimizer.init(params),
            outer=(),
            rng=jax.random.key_data(jax.random.fold_in(key, 1)),
        )

    def fresh(self) -> Any:
        """Random weights of the whole model, by the seed."""
        key = jax.random.key(self.config.seed)
        return initial_params(self.config.model, key, jnp.dtype(self.config.precision.parameters))

    def divided(self, weights: Any) -> tuple[Any, Any]:
        """(what is trained, what is not) of the model that starts from `weights`, adapters added."""
        model, adapter = self.config.model, self.config.adapter
        if adapter is not None:
            weights = started(weights, model, adapter, jax.random.fold_in(jax.random.key(self.config.seed), 2))
        return split(weights, model, adapter)

    def weights(self) -> Any:
        """The weights in the directory `model.from`, born sharded; None where there is none. Raises as `read`."""
        if self.config.model.origin is None:
            return None
        shapes = jax.eval_shape(self.fresh)
        shardings = weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero)
        return huggingface.read(self.config.model.origin, self.config.model, shapes=shapes, shardings=shardings)

    @cached_property
    def shapes(self) -> TrainState:
        """The state's shapes and dtypes; allocates nothing."""
        return jax.eval_shape(self.initial)

    @cached_property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        repeated = NamedSharding(self.mesh, PartitionSpec())
        zero = self.config.mesh.zero
        return TrainState(
            step=repeated,
            params=weight_shardings(self.shapes.params, mesh=self.mesh, zero=zero),
            frozen=weight_shardings(self.shapes.frozen, mesh=self.mesh, zero=zero),
            opt_state=optimizer_shardings(self.shapes.opt_state, self.shapes.params, mesh=self.mesh),
            outer=(),
            rng=repeated,
        )

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
            return jax.jit(self.initial, out_shardings=self.shardings)(self.weights())

    @cached_property
    def origin(self) -> str | None:
        """What tells the weights in `model.from` from others', where a run needs them again to go on."""
        if self.config.adapter is None or self.config.model.origin is None:
            return None
        return huggingface.fingerprint(self.config.model.origin)

    def completed(self, state: TrainState, *, origin: str | None) -> TrainState:
        """`state`, as a checkpoint holds it, with what never changes: made again from the seed, or from `model.from`.

        `origin` is that of the weights the checkpoint was trained on. Raises UserError where they are others now.
        """
        if self.config.adapter is None:
            return state
        if origin != self.origin:
            raise UserError(
                f"model.from: {self.config.model.origin} holds other weights than this run's adapter was trained on; "
                "bring them back, or train under another name"
            )
        with jax.set_mesh(self.mesh):
            make = jax.jit(lambda weights: self.initial(weights).frozen, out_shardings=self.shardings.frozen)
            return dataclasses.replace(state, frozen=make(self.weights()))

    def compiled_step(self) -> jax.stages.Compiled:
        """The training step, compiled; it consumes the state it is given."""
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.step, out_shardings=(self.shardings, None), donate_argnums=0)
            return jitted.lower(self._abstract_state(), self.batch_shapes).compile()

    def compiled_evaluation(self) -> jax.stages.Compiled:
        """Loss sums of a batch, compiled."""
        state = self._abstract_state()
        with jax.set_mesh(self.mesh):
            return jax.jit(self.evaluate).lower(state.params, state.frozen, self.batch_shapes).compile()

    def _abstract_state(self) -> TrainState:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.shapes,
            self.shardings,
        )


def build(config: RunConfig, mesh: Mesh) -> Program:
    """Compose recipe, model, memory policy, gradient engine and optimizer. Allocates nothing."""
    structure = graph(config.model, attached(config.model, config.adapter))
    loss = make_loss(
        structure,
        RECIPES[config.recipe.name],
        model=config.model,
        memory=config.memory,
        context=partial(context, config, mesh),
    )
    schedule = optimizers.schedule(config.optimizer, steps=config.steps)
    optimizer = optimizers.build(
        config.optimizer,
        steps=config.steps,
        spike=config.logging.spike,
        multiplied=None if config.adapter is None else multipliers(config.model, config.adapter),
    )
    engine = accumulated(plain(loss, dtype=jnp.dtype(config.precision.gradients)), microbatches=config.microbatches)
    step = make_step(engine, optimizer, schedule=schedule, dropout=drops(config), spike=config.logging.spike)

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        numerator, (weight, _) = loss(params, frozen, batch, None)
        return numerator, weight

    return Program(config, mesh, structure, optimizer, step, evaluate)


def drops(config: RunConfig) -> bool:
    """Whether anything is random in a forward pass of training."""
    return config.model.dropout > 0 or (config.adapter is not None and config.adapter.dropout > 0)


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
