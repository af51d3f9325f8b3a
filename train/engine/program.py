"""From configuration and mesh to compiled programs: how the state is born, where it lives, the step, the evaluation.

program = build(config, mesh)
state = program.initialized()
step = program.compiled_step()          # ahead of time; its plan can be read before anything runs
state, metrics = step(state, batch)
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...checkpoint.interop import huggingface
from ...checkpoint.layout_conversion import Layout, make_layout
from ...configs.errors import UserError
from ...configs.names import ADAPTER_FIELD, BATCH_FIELDS, RECIPE_FIELDS, TOP_FIELDS
from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...models.quantized_model import dequantize_tree, quantize_trained
from ...parallel.gradients import Engine
from ...parallel.hlo import refuse_permute_under_conditional
from ...parallel.layout import reorder_layers, run_shapes
from ...parallel.outer.traffic import Traffic, gathered_bytes, routed, traffic
from ...parallel.prng import step_key
from ...parallel.sharding import batch_shardings, optimizer_shardings, weight_shardings
from ...parallel.state import TrainState, combine
from ..objectives.distillation import init_weights, teacher_of, without_teacher
from ..objectives.registry import batch_fields
from ..optim import optimizers, qat
from ..optim.optimizer_update import post_validated, skip_if_unhealthy
from ..optim.optimizer_wrappers import optimizer_factory
from ..optim.sparse_finetuning import mask_is_final
from . import compile_cache
from .fisher import two_phase_engine
from .forward_backward import (
    Evaluate,
    init_params,
    model_graphdef,
    partition_params,
    pipelined_engines,
    single_stage_engines,
)
from .island_replica import Island, make_island
from .multi_adapter import make_multi_adapter
from .pipeline.pipeline_plan import PipelinePlan, make_pipeline_plan
from .pipeline.stages import routing_inputs
from .privacy.dp_sgd import add_noise
from .replicas import Replicas, Synchronize, make_replicas
from .step import Step, make_step, make_update, no_extra_inputs

# Dtypes of a batch's fields.
BATCH_DTYPES = dict.fromkeys(BATCH_FIELDS, jnp.int32) | dict.fromkeys(("loss_weights", *RECIPE_FIELDS), jnp.float32)
BATCH_DTYPES |= {"teacher_tokens": jnp.int32, ADAPTER_FIELD: jnp.int32}


@dataclass(frozen=True)
class Program:
    """Everything that is computed on devices, for one configuration on one mesh."""

    config: RunConfig
    mesh: Mesh
    graph: Any  # the model's structure
    optimizer: optax.GradientTransformation
    gradients: Engine  # (params, frozen, batch, keys) -> sums
    step: Step  # (state, batch) -> (state, metrics)
    evaluate: Evaluate
    measures: Mapping[str, Evaluate]  # what else is told of held-out text, likewise
    pipeline_plan: PipelinePlan | None = None  # where the layers stand in a pipeline; None without one
    replicas: Replicas | Island | None = None  # where several train by themselves: here, or one of them here

    @property
    def order(self) -> tuple[int, ...] | None:
        """Which repeat of the pattern stands at each place of the stacked arrays; None: in order."""
        return None if self.pipeline_plan is None else self.pipeline_plan.order

    @property
    def layout(self) -> Layout:
        """How the run's arrays hold the canonical ones."""
        if self.config.adapters:
            owners = [f"adapters/{name}" for name in self.config.adapters]
            return make_layout(self.config.model, self.order, owners=owners, per_owner=("params", "opt_state"))
        if not isinstance(self.replicas, Replicas):
            return make_layout(self.config.model, self.order)
        several = ("params", "opt_state", *(["outer"] if self.replicas.outer.per_replica else []))
        owners = [f"replica/{replica}" for replica in range(self.replicas.count)]
        return make_layout(self.config.model, self.order, owners=owners, per_owner=several)

    def initial(self, weights: Any = None, teacher: Any = None) -> TrainState:
        """The state before step 0, as a pure function of the seed, the `weights` it starts from and its teacher's."""
        one = self._one(weights, teacher)
        return self.replicas.initial(one) if self.replicas else one

    def _one(self, weights: Any = None, teacher: Any = None) -> TrainState:
        """`initial` of one replica."""
        params, frozen = partition_params(
            self.config, init_params(self.config) if weights is None else weights, teacher
        )
        parts = self.to_run_order({"params": params, "frozen": frozen})
        params = self._held(parts["params"])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=parts["frozen"],
            opt_state=self.optimizer.init(params),
            outer=(),
            rng=jax.random.key_data(step_key(self.config)),
        )

    def to_run_order(self, tree: Any) -> Any:
        """`tree`, layers in order, as the run stacks them: a teacher's in the order of its own pipeline."""
        teacher = None if self.pipeline_plan is None else self.pipeline_plan.teacher
        found = reorder_layers(tree, before=None, after=self.order)
        if teacher is None:
            return found
        own = reorder_layers({"teacher": tree["frozen"]["teacher"]}, before=None, after=teacher.order)
        return found | {"frozen": found["frozen"] | own}

    def _held(self, params: Any) -> Any:
        """`params` as the state has them."""
        return quantize_trained(params, self.config.model, self.config.quantization)

    def initial_weights(self) -> Any:
        """All weights of the forward pass before step 0, their layers in order, born sharded."""

        def born(weights: Any) -> Any:
            params, frozen = partition_params(self.config, init_params(self.config) if weights is None else weights)
            return combine(qat.dequantized_weights(self._held(params), self.config), without_teacher(frozen))

        shapes = jax.eval_shape(born, None)
        where = weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero)
        with jax.set_mesh(self.mesh):
            return jax.jit(born, out_shardings=where)(self.weights())

    def weights(self) -> Any:
        """The weights in the directory `model.from`, born sharded; None where there is none. Raises as `read`."""
        return self._read(self.config.model)

    def teacher_weights(self) -> Any:
        """The weights in the directory `recipe.teacher.from`, like `weights`."""
        return None if self.config.recipe.teacher is None else self._read(self.config.recipe.teacher)

    def _read(self, model: ModelConfig) -> Any:
        if model.origin is None:
            return None
        shapes = jax.eval_shape(partial(init_weights, model, self.config))
        shardings = weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero)
        return huggingface.read(model.origin, model, shapes=shapes, shardings=shardings)

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
            opt_state=optimizer_shardings(shapes.opt_state, self._weight_shapes, mesh=self.mesh),
            outer=(),
            rng=repeated,
        )
        return self.replicas.shardings(one, shapes.params) if self.replicas else one

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of one global batch."""
        shape = (self.config.data.global_batch, self.config.data.sequence_length)
        shardings = batch_shardings(self.mesh, batch_fields(self.config))
        return {
            field: jax.ShapeDtypeStruct((*shape, *self.extra_dimensions(field)), BATCH_DTYPES[field], sharding=sharding)
            for field, sharding in shardings.items()
        }

    def extra_dimensions(self, field: str) -> tuple[int, ...]:
        """Dimensions of a batch's `field` beyond [global_batch, sequence]."""
        return (self.config.recipe.top_k,) if field in TOP_FIELDS else ()

    def initialize(self) -> TrainState:
        """The state before step 0, born sharded."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self.initial, out_shardings=self.shardings)(*self._given())

    def _given(self) -> tuple[Any, Any]:
        """The weights that `initial` starts from; a teacher only where it stays."""
        return self.weights(), None if teacher_of(self.config) is None else self.teacher_weights()

    @cached_property
    def origin(self) -> str | None:
        """What tells the weights that a run needs again to go on from others': of a base, a reference and a teacher."""
        return " ".join(map(huggingface.fingerprint, self._origins)) or None

    @property
    def _origins(self) -> list[str]:
        config, teacher = self.config, self.config.recipe.teacher
        based = config.adapter is not None and config.quantization is None  # a quantized base is kept with the run
        needed = [config.model] * (based or config.recipe.reads_itself) + ([teacher] if teacher else [])
        return [model.origin for model in needed if model.origin is not None]

    def restore_frozen(self, state: TrainState, *, origin: str | None) -> TrainState:
        """`state`, as a checkpoint holds it, with what never changes: made again from the seed, or from `model.from`.

        `origin` is that of the weights the checkpoint was trained on. Raises UserError where they are others now.
        """
        if not jax.tree.leaves(self.shapes.frozen):
            return state
        self.check_origin(origin)
        with jax.set_mesh(self.mesh):
            make = jax.jit(lambda *given: self.initial(*given).frozen, out_shardings=self.shardings.frozen)
            return dataclasses.replace(state, frozen=make(*self._given()))

    def check_origin(self, origin: str | None) -> None:
        """Raise UserError where the weights a run needs again to go on are not those of `origin`, a checkpoint's."""
        if not set((self.origin or "").split()) <= set((origin or "").split()):
            raise UserError(
                f"{' or '.join(self._origins)} holds other weights than this run was trained with; bring them back, or "
                "train under another name"
            )

    def compiled_step(self) -> jax.stages.Compiled:
        """The training step, compiled; it consumes the state it is given."""
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.step, out_shardings=(self.shardings, None), donate_argnums=0)
            lowered = jitted.lower(self._abstract_state(), self.batch_shapes)
            return self._safe(compile_cache.compile_cached(lowered, self.mesh))

    def compiled_synchronization(self) -> Synchronize:
        """`meet(state, update)`: what replicas do here after update number `update`; a run of one does nothing."""
        if not isinstance(self.replicas, Replicas):
            return lambda state, update: state
        return self.replicas.compiled_synchronization(self.shapes, self.shardings)

    def compiled_evaluation(self) -> jax.stages.Compiled:
        """Loss sums of a batch, compiled, for parameters as `evaluated` gives them."""
        return self._compiled(self.evaluate)

    @cached_property
    def compiled_measures(self) -> dict[str, jax.stages.Compiled]:
        """The same of each of `measures`."""
        return {name: self._compiled(measure) for name, measure in self.measures.items()}

    def _compiled(self, evaluate: Evaluate) -> jax.stages.Compiled:
        frozen = self._abstract_state().frozen
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(evaluate, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
            lowered = jitted.lower(self._abstract_params(), frozen, self.batch_shapes)
            return self._safe(compile_cache.compile_cached(lowered, self.mesh))

    def _safe(self, compiled: jax.stages.Compiled) -> jax.stages.Compiled:
        """`compiled`, unless it is a pipeline that would wait for ever: MeshwrightError, naming the operation."""
        if self.pipeline_plan is not None:
            refuse_permute_under_conditional(compiled.as_text(), self.mesh)
        return compiled

    def to_canonical_order(self, params: Any) -> Any:
        """All weights of the forward pass with their layers in order, as what does not run in a pipeline reads them."""
        if self.order is None:
            return params
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda tree: reorder_layers({"params": tree}, before=self.order, after=None)["params"])(
                params
            )

    def merged_weights(self, state: TrainState) -> Any:
        """All weights that the model reads, as it reads them."""
        return combine(self.eval_params(state), without_teacher(state.frozen))

    def dequantized_weights(self, state: TrainState) -> Any:
        """All weights to export, none of them quantized."""
        dtype = jnp.dtype(self.config.precision.parameters)
        return dequantize_tree(self.merged_weights(state), self.config.model, self.config.quantization, dtype=dtype)

    def eval_params(self, state: TrainState) -> Any:
        """The parameters to evaluate, sample from and export: the outer ones, an average where one is kept, or all."""
        return self._evaluated(state) if self._evaluated else state.params

    @cached_property
    def _evaluated(self) -> Callable[[TrainState], Any] | None:
        averages = "average" in self.shapes.opt_state
        if not (self.replicas or averages or qat.trains_codes(self.config)):
            return None
        where = jax.tree.map(lambda leaf: leaf.sharding, self._abstract_params())
        own = average_params if averages else lambda state: qat.dequantized_weights(state.params, self.config)
        return jax.jit(self.replicas.parameters if self.replicas else own, out_shardings=where)

    @cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """What each replica sends, and when; nothing in a run of one."""
        if not self.replicas:
            return ()
        meetings = traffic(
            self.config.outer,
            self.array_shapes,
            layers=self.config.model.layers,
            replicas=self.replicas.count,
            collected=gathered_bytes if isinstance(self.replicas, Island) else None,
        )
        return (*meetings, self._routed()) if self.config.outer.routing and self.pipeline_plan else meetings

    def _routed(self) -> Traffic:
        """What microbatches carry from replica to replica."""
        table, config = self.pipeline_plan.table, self.config
        tokens = config.data.global_batch * config.data.sequence_length // self.replicas.count
        of_token = config.model.embed * jnp.dtype(config.precision.compute).itemsize
        keys = 8 * config.data.global_batch // self.replicas.count if uses_dropout(config) else 0
        return routed(
            ticks=table.ticks,
            pipe=table.devices,
            chunks=table.chunks,
            replicas=self.replicas.count,
            message=tokens // table.microbatches * of_token,
            fields=sum(shape.size * shape.dtype.itemsize for shape in self.batch_shapes.values()) // self.replicas.count
            + keys,
        )

    @cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one replica's every parameter, by canonical name."""
        return run_shapes(self._abstract_params(), self.config.model, self.order)

    def _abstract_params(self) -> Any:
        """One replica's parameters as the model reads them, and where they live."""
        shapes = self._weight_shapes
        return jax.tree.map(with_sharding, shapes, weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero))

    @cached_property
    def _weight_shapes(self) -> Any:
        return jax.eval_shape(lambda: qat.dequantized_weights(self._one().params, self.config))

    def _abstract_state(self) -> TrainState:
        return jax.tree.map(with_sharding, self.shapes, self.shardings)


def with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `leaf`, at `sharding`."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def average_params(state: TrainState) -> Any:
    """The moving average of the parameters, in their dtype."""
    return jax.tree.map(lambda mean, own: mean.astype(own.dtype), state.opt_state["average"].params, state.params)


def build(config: RunConfig, mesh: Mesh, *, replica_count: int | None = None) -> Program:
    """Compose recipe, model, memory policy, gradient engine, optimizer and outer optimizer. Allocates nothing.

    `replica_count` is for a mesh that is not the run's own: replicas that it has no axis for are on every device.
    """
    model = model_graphdef(config)
    staged = make_pipeline_plan(config, pipe=mesh.shape["pipe"])
    engines = (
        single_stage_engines(config, mesh, model) if staged is None else pipelined_engines(config, mesh, model, staged)
    )
    schedule = optimizers.schedule(config.optimizer, steps=config.steps)
    order = None if staged is None else staged.order
    make = optimizer_factory(config, order=order)
    optimizer, lift = make(), make_multi_adapter(config)
    update = skip_if_unhealthy(optimizer)
    if staged is not None and config.pipeline.post_validation:
        update = post_validated(optimizer, make(clip=optimizers.unclipped), clip=config.optimizer.clip)
    if config.privacy is not None:
        update = add_noise(update, config.privacy, rows=config.data.global_batch)
    gradients = qat.with_dequantized_weights(engines.train, config)
    train, told = gradients, no_extra_inputs
    if engines.squared_gradients is not None:
        train, told = two_phase_engine(
            partial(mask_is_final, adapter=config.adapter), engines.squared_gradients, gradients
        )
    if staged is not None and config.outer is not None and config.outer.routing:
        told = routing_inputs(config.seed, staged.table, replicas=config.mesh.replica)
    applied, numbers = make_update(update, schedule=schedule, spike=config.logging.spike), None
    if lift is not None:
        optimizer, applied, numbers = lift.optimizer(optimizer), lift.apply_update(applied), lift.row_ids
    step = make_step(train, applied, dropout=uses_dropout(config), extra_inputs=told, row_ids=numbers)
    evaluate, measures = engines.evaluate, engines.measures
    if config.islands:
        several = make_island(config, mesh, order=order)
    else:
        several = make_replicas(config, mesh, count=replica_count, order=order)
    if several:
        step, evaluate = several.step(step), several.evaluate(evaluate)
        measures = {name: several.evaluate(measure) for name, measure in measures.items()}
    return Program(config, mesh, model, optimizer, gradients, step, evaluate, measures, staged, several)


def uses_dropout(config: RunConfig) -> bool:
    """Whether anything is random in a forward pass of training."""
    return config.model.dropout > 0 or (config.adapter is not None and config.adapter.dropout > 0)
