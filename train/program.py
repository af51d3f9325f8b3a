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
from ..checkpoint.layouts import Layout, layout_of
from ..configs.adapter import ELEMENTS
from ..configs.errors import UserError
from ..configs.names import BATCH_FIELDS, RECIPE_FIELDS
from ..configs.run import RunConfig
from ..models.adapters.selection import multipliers
from ..models.adapters.sites import sites
from ..models.quantized.attach import dequantized
from ..parallel.hlo import refuse_permute_under_conditional
from ..parallel.layout import rearranged, run_shapes
from ..parallel.lowcomm.bytes import Traffic, gathered_bytes, traffic
from ..parallel.rules import batch_shardings, optimizer_shardings, weight_shardings
from ..parallel.state import TrainState, combine
from . import optimizers
from .elements import elementwise
from .engines import divided, fresh, pipelined, structure, whole
from .gradients import Batch, Engine
from .islands import Island, island_of
from .ranks import allocated
from .recipes.registry import RECIPES
from .repair import without_teacher
from .replicas import Meet, Replicas, replicas_of
from .staging import Staging, staging
from .step import Step, make_step
from .update import guarded, post_validated

# Dtypes of a batch's fields; all are [global_batch, sequence].
BATCH_DTYPES = dict.fromkeys(BATCH_FIELDS, jnp.int32) | dict.fromkeys(("loss_weights", *RECIPE_FIELDS), jnp.float32)


@dataclass(frozen=True)
class Program:
    """Everything that is computed on devices, for one configuration on one mesh."""

    config: RunConfig
    mesh: Mesh
    graph: Any  # the model's structure
    optimizer: optax.GradientTransformation
    gradients: Engine  # (params, frozen, batch, keys) -> sums
    step: Step  # (state, batch) -> (state, metrics)
    evaluate: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight
    staging: Staging | None = None  # where the layers stand in a pipeline; None without one
    replicas: Replicas | Island | None = None  # where several train by themselves: here, or one of them here

    @property
    def order(self) -> tuple[int, ...] | None:
        """Which repeat of the pattern stands at each place of the stacked arrays; None: in order."""
        return None if self.staging is None else self.staging.order

    @property
    def layout(self) -> Layout:
        """How the run's arrays hold the canonical ones."""
        if not isinstance(self.replicas, Replicas):
            return layout_of(self.config.model, self.order)
        several = ("params", "opt_state", *(["outer"] if self.replicas.outer.per_replica else []))
        return layout_of(self.config.model, self.order, replicas=self.replicas.count, several=several)

    def initial(self, weights: Any = None) -> TrainState:
        """The state before step 0, as a pure function of the seed and of the `weights` it starts from, if any."""
        one = self._one(weights)
        return self.replicas.initial(one) if self.replicas else one

    def _one(self, weights: Any = None) -> TrainState:
        """`initial` of one replica."""
        key = jax.random.key(self.config.seed)
        params, frozen = divided(self.config, fresh(self.config) if weights is None else weights)
        parts = rearranged({"params": params, "frozen": frozen}, before=None, after=self.order)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=parts["params"],
            frozen=parts["frozen"],
            opt_state=self.optimizer.init(parts["params"]),
            outer=(),
            rng=jax.random.key_data(jax.random.fold_in(key, 1)),
        )

    def first_weights(self) -> Any:
        """All weights of the forward pass before step 0, their layers in order, born sharded."""

        def born(weights: Any) -> Any:
            return combine(*divided(self.config, fresh(self.config) if weights is None else weights))

        shapes = jax.eval_shape(born, None)
        where = weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero)
        with jax.set_mesh(self.mesh):
            return jax.jit(born, out_shardings=where)(self.weights())

    def weights(self) -> Any:
        """The weights in the directory `model.from`, born sharded; None where there is none. Raises as `read`."""
        if self.config.model.origin is None:
            return None
        shapes = jax.eval_shape(partial(fresh, self.config))
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
        shardings = batch_shardings(self.mesh, RECIPES[self.config.recipe.name].fields)
        return {
            field: jax.ShapeDtypeStruct(shape, BATCH_DTYPES[field], sharding=sharding)
            for field, sharding in shardings.items()
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
            return self._safe(jitted.lower(self._abstract_state(), self.batch_shapes).compile())

    def compiled_meetings(self) -> Meet:
        """`meet(state, update)`: what replicas do here after update number `update`; a run of one does nothing."""
        if not isinstance(self.replicas, Replicas):
            return lambda state, update: state
        return self.replicas.compiled_meetings(self.shapes, self.shardings)

    def compiled_evaluation(self) -> jax.stages.Compiled:
        """Loss sums of a batch, compiled, for parameters as `evaluated` gives them."""
        frozen = self._abstract_state().frozen
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.evaluate)
            return self._safe(jitted.lower(self._abstract_params(), frozen, self.batch_shapes).compile())

    def _safe(self, compiled: jax.stages.Compiled) -> jax.stages.Compiled:
        """`compiled`, unless it is a pipeline that would wait for ever: MeshwrightError, naming the operation."""
        if self.staging is not None:
            refuse_permute_under_conditional(compiled.as_text(), self.mesh)
        return compiled

    def in_order(self, params: Any) -> Any:
        """All weights of the forward pass with their layers in order, as what does not run in a pipeline reads them."""
        if self.order is None:
            return params
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda tree: rearranged({"params": tree}, before=self.order, after=None)["params"])(params)

    def whole(self, state: TrainState) -> Any:
        """All weights that the model reads, as it reads them."""
        return combine(self.evaluated(state), without_teacher(state.frozen))

    def plain(self, state: TrainState) -> Any:
        """All weights to export, none of them quantized."""
        dtype = jnp.dtype(self.config.precision.parameters)
        return dequantized(self.whole(state), self.config.model, self.config.quantization, dtype=dtype)

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
            self.config.outer,
            self.array_shapes,
            layers=self.config.model.layers,
            replicas=self.replicas.count,
            collected=gathered_bytes if isinstance(self.replicas, Island) else None,
        )

    @cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one replica's every parameter, by canonical name."""
        return run_shapes(self._abstract_params(), self.config.model, self.order)

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
    model = structure(config)
    staged = staging(config, pipe=mesh.shape["pipe"])
    engines = whole(config, mesh, model) if staged is None else pipelined(config, mesh, model, staged)
    schedule = optimizers.schedule(config.optimizer, steps=config.steps)
    order = None if staged is None else staged.order
    chosen = None if config.adapter is None else multipliers(config.model, config.adapter, order=order)
    make = partial(
        optimizers.build,
        config.optimizer,
        steps=config.steps,
        spike=config.logging.spike,
        multiplied=chosen,
    )
    if config.adapter is not None and config.adapter.method == "adalora":
        maps = sum(rank > 0 for site in sites(config.model, config.adapter) for rank in site.ranks)
        make = wrapped(make, partial(allocated, adapter=config.adapter, maps=maps, steps=config.steps))
    if config.adapter is not None and config.adapter.method in ELEMENTS:
        make = wrapped(make, partial(elementwise, adapter=config.adapter, chosen=chosen))
    optimizer = make()
    update = guarded(optimizer)
    if staged is not None and config.pipeline.post_validation:
        update = post_validated(optimizer, make(clip=optimizers.unclipped), clip=config.optimizer.clip)
    step = make_step(engines.train, update, schedule=schedule, dropout=drops(config), spike=config.logging.spike)
    evaluate = engines.evaluate
    several = island_of(config, mesh) if config.islands else replicas_of(config, mesh, count=replica_count)
    if several:
        step, evaluate = several.step(step), several.evaluate(evaluate)
    return Program(config, mesh, model, optimizer, engines.train, step, evaluate, staged, several)


def wrapped(
    make: Callable[..., optax.GradientTransformation], around: Callable[..., optax.GradientTransformation]
) -> Callable[..., optax.GradientTransformation]:
    """`make`, with `around` around what it makes."""
    return lambda **given: around(make(**given))


def drops(config: RunConfig) -> bool:
    """Whether anything is random in a forward pass of training."""
    return config.model.dropout > 0 or (config.adapter is not None and config.adapter.dropout > 0)
