"""From a configuration and a mesh to compiled programs: the first state, its shardings, the step, the evaluation.

    program = build(config, mesh)
    state = program.initialize()
    step = program.compiled_step()          # ahead of time, so its plan can be read before anything runs
    state, metrics = step(state, batch)

"Run order" is the order in which the run stacks its layers: a pipeline stacks them by device. In canonical order they
follow each other as in the model.
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
from ...configs.names import ADAPTER_IDS_FIELD, BATCH_FIELDS, RECIPE_FIELDS, TEACHER_TOP_K_FIELDS
from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...configs.sections.parallel import PrecisionConfig
from ...models.quantized_model import dequantize_tree, quantize_trained
from ...parallel.compiler_options import compiler_options
from ...parallel.gradients import Engine
from ...parallel.hlo.collectives import refuse_permute_under_conditional
from ...parallel.layout import reorder_layers, run_shapes
from ...parallel.outer.traffic import Traffic, all_gather_bytes, outer_traffic, routing_traffic
from ...parallel.prng import step_key
from ...parallel.sharding import batch_shardings, optimizer_shardings, weight_shardings, with_shardings
from ...parallel.state import TrainState, combine
from ..objectives.distillation import init_weights, teacher_of, without_teacher
from ..objectives.registry import batch_fields
from ..optim import qat
from ..optim.gradient_clipping import no_clipping
from ..optim.learning_rate_schedule import learning_rate_schedule
from ..optim.optimizer_factory import optimizer_factory
from ..optim.optimizer_update import post_validated, skip_nonfinite_or_spiking
from ..optim.sparse_finetuning import mask_is_final
from . import compile_cache
from .fisher import two_phase_engine
from .forward_backward import Evaluate, pipelined_engines, single_stage_engines
from .island_replica import Island, make_island
from .model_structure import model_graphdef, partition_params
from .multi_adapter import make_multi_adapter
from .pipeline.pipeline_plan import PipelinePlan, make_pipeline_plan
from .pipeline.stages import routing_inputs
from .privacy.dp_sgd import add_noise
from .replicas import Replicas, Synchronize, make_replicas
from .step import Step, make_step, make_update, no_extra_inputs

# Dtypes of a batch's fields.
BATCH_DTYPES = dict.fromkeys(BATCH_FIELDS, jnp.int32) | dict.fromkeys(("loss_weights", *RECIPE_FIELDS), jnp.float32)
BATCH_DTYPES |= {"teacher_tokens": jnp.int32, ADAPTER_IDS_FIELD: jnp.int32}


@dataclass(frozen=True)
class Program:
    """Everything that is computed on devices, for one configuration on one mesh."""

    config: RunConfig
    mesh: Mesh
    graph: Any  # the model's structure, an nnx graphdef
    optimizer: optax.GradientTransformation
    gradient_engine: Engine  # (params, frozen, batch, keys) -> sums
    step: Step  # (state, batch) -> (state, metrics)
    evaluate: Evaluate
    measures: Mapping[str, Evaluate]  # further metrics of held-out text, by name
    pipeline_plan: PipelinePlan | None = None  # None without a pipeline
    replicas: Replicas | Island | None = None  # all replicas of the run, or this island; None if there is one replica

    @property
    def order(self) -> tuple[int, ...] | None:
        """The repeat of the layer pattern at each place of the stacked arrays; None: canonical order."""
        return None if self.pipeline_plan is None else self.pipeline_plan.order

    @property
    def layout(self) -> Layout:
        """How the arrays of the run map to canonical ones."""
        if self.config.adapters:
            owners = [f"adapters/{name}" for name in self.config.adapters]
            return make_layout(self.config.model, self.order, owners=owners, per_owner=("params", "opt_state"))
        if not isinstance(self.replicas, Replicas):
            return make_layout(self.config.model, self.order)
        per_replica = ("params", "opt_state", *(["outer"] if self.replicas.outer.per_replica else []))
        owners = [f"replica/{replica}" for replica in range(self.replicas.count)]
        return make_layout(self.config.model, self.order, owners=owners, per_owner=per_replica)

    def initial(self, weights: Any = None, teacher: Any = None) -> TrainState:
        """Return the state before the first step: a pure function of the seed and the pretrained weights, if any."""
        single = self._initial_single(weights, teacher)
        return self.replicas.initial(single) if self.replicas else single

    def _initial_single(self, weights: Any = None, teacher: Any = None) -> TrainState:
        """`initial` for one replica."""
        params, frozen = partition_params(self.config, weights, teacher)
        parts = self.to_run_order({"params": params, "frozen": frozen})
        params = quantize_trained(parts["params"], self.config.model, self.config.quantization)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=parts["frozen"],
            opt_state=self.optimizer.init(params),
            outer=(),
            rng=jax.random.key_data(step_key(self.config)),
        )

    def to_run_order(self, tree: Any) -> Any:
        """Reorder the layers of a canonical state or {"params", "frozen"} tree into run order, a teacher's likewise."""
        teacher = None if self.pipeline_plan is None else self.pipeline_plan.teacher
        reordered = reorder_layers(tree, before=None, after=self.order)
        if teacher is None:
            return reordered
        teacher_tree = reorder_layers({"teacher": tree["frozen"]["teacher"]}, before=None, after=teacher.order)
        return reordered | {"frozen": reordered["frozen"] | teacher_tree}

    def initial_weights(self) -> Any:
        """Return all weights of the forward pass before the first step, in canonical order, created sharded."""

        def create(weights: Any) -> Any:
            params, frozen = partition_params(self.config, weights)
            params = quantize_trained(params, self.config.model, self.config.quantization)
            return combine(qat.dequantized_weights(params, self.config), without_teacher(frozen))

        shardings = self._weight_shardings(jax.eval_shape(create, None))
        with jax.set_mesh(self.mesh):
            return jax.jit(create, out_shardings=shardings)(self.pretrained_weights())

    def pretrained_weights(self) -> Any:
        """Read the weights in the directory `model.from`, sharded; None without `model.from`. Raises UserError."""
        return self._read(self.config.model)

    def teacher_weights(self) -> Any:
        """Read the weights in the directory `recipe.teacher.from`, sharded; None without a teacher's directory."""
        return None if self.config.recipe.teacher is None else self._read(self.config.recipe.teacher)

    def _read(self, model: ModelConfig) -> Any:
        if model.origin is None:
            return None
        shapes = jax.eval_shape(partial(init_weights, self.config, model))
        return huggingface.read(model.origin, model, shapes=shapes, shardings=self._weight_shardings(shapes))

    def _weight_shardings(self, shapes: Any) -> Any:
        return weight_shardings(shapes, mesh=self.mesh, zero=self.config.mesh.zero)

    @cached_property
    def shapes(self) -> TrainState:
        """Shapes and dtypes of the state; allocates nothing."""
        return jax.eval_shape(self.initial)

    @cached_property
    def shardings(self) -> TrainState:
        """The sharding of each array of the state."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        shapes = jax.eval_shape(self._initial_single)
        single = TrainState(
            step=replicated,
            params=self._weight_shardings(shapes.params),
            frozen=self._weight_shardings(shapes.frozen),
            opt_state=optimizer_shardings(shapes.opt_state, self._weight_shapes, mesh=self.mesh),
            outer=(),
            rng=replicated,
        )
        return self.replicas.shardings(single, shapes.params) if self.replicas else single

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each field of a global batch."""
        shape = (self.config.data.global_batch, self.config.data.sequence_length)
        shardings = batch_shardings(self.mesh, batch_fields(self.config))
        return {
            field: jax.ShapeDtypeStruct((*shape, *self.extra_dimensions(field)), BATCH_DTYPES[field], sharding=sharding)
            for field, sharding in shardings.items()
        }

    def extra_dimensions(self, field: str) -> tuple[int, ...]:
        """Dimensions of a batch's `field` beyond [global_batch, sequence]."""
        return (self.config.recipe.top_k,) if field in TEACHER_TOP_K_FIELDS else ()

    def initialize(self) -> TrainState:
        """Return the state before the first step, created sharded."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self.initial, out_shardings=self.shardings)(*self._read_weights())

    def _read_weights(self) -> tuple[Any, Any]:
        """Read (pretrained weights, teacher's weights); the teacher's are None if the state does not hold it."""
        return self.pretrained_weights(), None if teacher_of(self.config) is None else self.teacher_weights()

    @cached_property
    def origin(self) -> str | None:
        """Fingerprints of the weights on disk that a restored run reads again: of a base, a reference, a teacher."""
        return " ".join(map(huggingface.fingerprint, self._origins)) or None

    @property
    def _origins(self) -> list[str]:
        """Directories of the weights that a restored run reads again."""
        config, teacher = self.config, self.config.recipe.teacher
        reads_base = config.adapter is not None and config.quantization is None  # the run keeps a quantized base
        models = [config.model] * (reads_base or config.recipe.needs_initial_weights) + ([teacher] if teacher else [])
        return [model.origin for model in models if model.origin is not None]

    def restore_frozen(self, state: TrainState, *, origin: str | None) -> TrainState:
        """Add the frozen weights, which no checkpoint holds, to a restored state: from the seed, or from `model.from`.

        `origin` is the value that the checkpoint recorded. Raises UserError if the weights on disk are others now.
        """
        if not jax.tree.leaves(self.shapes.frozen):
            return state
        self.check_origin(origin)
        with jax.set_mesh(self.mesh):
            create = jax.jit(lambda *weights: self.initial(*weights).frozen, out_shardings=self.shardings.frozen)
            return dataclasses.replace(state, frozen=create(*self._read_weights()))

    def check_origin(self, origin: str | None) -> None:
        """Raise UserError if the weights on disk are not those that a checkpoint recorded as its `origin`."""
        if not set((self.origin or "").split()) <= set((origin or "").split()):
            raise UserError(
                f"{' or '.join(self._origins)} holds other weights than this run was trained with; bring them back, or "
                "train under another name"
            )

    def compiled_step(self) -> jax.stages.Compiled:
        """Compile the training step (state, batch) -> (state, metrics), which donates its state."""
        shardings = (self.shardings, None)
        return self._compile(self.step, self._abstract_state(), out_shardings=shardings, donate_argnums=0)

    def compiled_synchronization(self) -> Synchronize:
        """Compile `synchronize(state, step)`, which runs the outer steps of replicas that are due after `step`."""
        if not isinstance(self.replicas, Replicas):
            return lambda state, step: state
        return self.replicas.compiled_synchronization(self.shapes, self.shardings)

    def compiled_evaluation(self) -> jax.stages.Compiled:
        """Compile (eval_params, frozen, batch) -> (loss sum, weight)."""
        return self._compile_evaluation(self.evaluate)

    @cached_property
    def compiled_measures(self) -> dict[str, jax.stages.Compiled]:
        """Each of `measures`, compiled like the evaluation."""
        return {name: self._compile_evaluation(measure) for name, measure in self.measures.items()}

    def _compile_evaluation(self, evaluate: Evaluate) -> jax.stages.Compiled:
        weights = (self._abstract_params(), self._abstract_state().frozen)
        return self._compile(evaluate, *weights, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def _compile(self, function: Callable, *arguments: Any, **options: Any) -> jax.stages.Compiled:
        """Compile `function` for `arguments` and a batch. Raises MeshwrightError for a pipeline that would deadlock."""
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(matmul_precision(self.config.precision, self.mesh)):
            lowered = jax.jit(function, **options).lower(*arguments, self.batch_shapes)
            compiled = compile_cache.compile_cached(
                lowered, self.mesh, options=compiler_options(self.config.mesh, self.mesh)
            )
        if self.pipeline_plan is not None:
            refuse_permute_under_conditional(compiled.as_text(), self.mesh)
        return compiled

    def to_canonical_order(self, params: Any) -> Any:
        """Reorder the layers of `params` from run order to canonical order, for programs without a pipeline."""
        if self.order is None:
            return params
        reorder = partial(reorder_layers, before=self.order, after=None)
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda tree: reorder({"params": tree})["params"])(params)

    def merged_weights(self, state: TrainState) -> Any:
        """Merge evaluation parameters and frozen weights into one tree: all that the model reads."""
        return combine(self.eval_params(state), without_teacher(state.frozen))

    def dequantized_weights(self, state: TrainState) -> Any:
        """Return `merged_weights` with no array quantized, for an export."""
        dtype = jnp.dtype(self.config.precision.parameters)
        return dequantize_tree(self.merged_weights(state), self.config.model, self.config.quantization, dtype=dtype)

    def eval_params(self, state: TrainState) -> Any:
        """Return the parameters to evaluate, sample from and export.

        They are the outer parameters of replicas, the moving average with `optimizer.ema`, else the trained ones.
        """
        return self._eval_params_fn(state) if self._eval_params_fn else state.params

    @cached_property
    def _eval_params_fn(self) -> Callable[[TrainState], Any] | None:
        if self.replicas:
            eval_params = self.replicas.eval_params
        elif "average" in self.shapes.opt_state:
            eval_params = lambda state: optax.tree.cast_like(state.opt_state["average"].params, state.params)
        elif qat.trains_codes(self.config):
            eval_params = lambda state: qat.dequantized_weights(state.params, self.config)
        else:
            return None
        return jax.jit(eval_params, out_shardings=self._weight_shardings(self._weight_shapes))

    @cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """What each replica sends, and when; empty for a run of one replica."""
        if not self.replicas:
            return ()
        traffic = outer_traffic(
            self.config.outer,
            self.array_shapes,
            layers=self.config.model.layers,
            replicas=self.replicas.count,
            mean_bytes=all_gather_bytes if isinstance(self.replicas, Island) else None,
        )
        routes = self.config.outer.routing and self.pipeline_plan
        return (*traffic, self._routing_traffic()) if routes else traffic

    def _routing_traffic(self) -> Traffic:
        """What a pipeline sends when its microbatches pass from replica to replica."""
        table, config, replicas = self.pipeline_plan.table, self.config, self.replicas.count
        tokens = config.data.global_batch * config.data.sequence_length // replicas
        token_bytes = config.model.embed * jnp.dtype(config.precision.compute).itemsize
        batch_bytes = sum(shape.size * shape.dtype.itemsize for shape in self.batch_shapes.values())
        key_bytes = 8 * config.data.global_batch if uses_dropout(config) else 0
        return routing_traffic(
            ticks=table.ticks,
            pipe=table.devices,
            chunks=table.chunks,
            replicas=replicas,
            message=tokens // table.microbatches * token_bytes,
            fields=batch_bytes // replicas + key_bytes // replicas,
        )

    @cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one replica, by canonical name."""
        return run_shapes(self._abstract_params(), self.config.model, self.order)

    def _abstract_params(self) -> Any:
        """Shapes and shardings of one replica's parameters, as the model reads them."""
        return with_shardings(self._weight_shapes, self._weight_shardings(self._weight_shapes))

    @cached_property
    def _weight_shapes(self) -> Any:
        return jax.eval_shape(lambda: qat.dequantized_weights(self._initial_single().params, self.config))

    def _abstract_state(self) -> TrainState:
        return with_shardings(self.shapes, self.shardings)


def build(config: RunConfig, mesh: Mesh, *, replica_count: int | None = None) -> Program:
    """Compose recipe, model, memory policy, gradient engine, optimizer and outer optimizer. Allocates nothing.

    `replica_count` is for a mesh without an axis for the run's replicas: then all of them are on every device.
    """
    graph = model_graphdef(config)
    plan = make_pipeline_plan(config, pipe=mesh.shape["pipe"])
    if plan is None:
        order, engines = None, single_stage_engines(config, mesh, graph)
    else:
        order, engines = plan.order, pipelined_engines(config, mesh, graph, plan)
    make_optimizer = optimizer_factory(config, order=order)
    optimizer = make_optimizer()
    update = skip_nonfinite_or_spiking(optimizer)
    if plan is not None and config.pipeline.post_validation:
        update = post_validated(optimizer, make_optimizer(clip=no_clipping), clip=config.optimizer.clip)
    if config.privacy is not None:
        update = add_noise(update, config.privacy, rows=config.data.global_batch)
    gradient_engine = qat.with_dequantized_weights(engines.train, config)
    train_engine, extra_inputs = gradient_engine, no_extra_inputs
    if engines.squared_gradients is not None:
        is_final = partial(mask_is_final, adapter=config.adapter)
        train_engine, extra_inputs = two_phase_engine(is_final, engines.squared_gradients, gradient_engine)
    if plan is not None and config.outer is not None and config.outer.routing:
        extra_inputs = routing_inputs(config.seed, plan.table, replicas=config.mesh.replica)
    schedule = learning_rate_schedule(config.optimizer, steps=config.steps)
    apply_update, row_ids = make_update(update, schedule=schedule, spike=config.logging.spike), None
    if (adapters := make_multi_adapter(config)) is not None:
        optimizer, row_ids = adapters.optimizer(optimizer), adapters.row_ids
        apply_update = adapters.apply_update(apply_update)
    dropout = uses_dropout(config)
    step = make_step(train_engine, apply_update, dropout=dropout, extra_inputs=extra_inputs, row_ids=row_ids)
    evaluate, measures = engines.evaluate, engines.measures
    if config.islands:
        replicas = make_island(config, mesh, order=order)
    else:
        replicas = make_replicas(config, mesh, count=replica_count, order=order)
    if replicas:
        step, evaluate = replicas.step(step), replicas.evaluate(evaluate)
        measures = {name: replicas.evaluate(measure) for name, measure in measures.items()}
    return Program(config, mesh, graph, optimizer, gradient_engine, step, evaluate, measures, plan, replicas)


def matmul_precision(precision: PrecisionConfig, mesh: Mesh) -> str | None:
    """JAX's name for the precision of products. TPUs and GPUs round float32 inputs to fewer bits unless told not to."""
    return "highest" if precision.compute == "float32" and mesh.devices.flat[0].platform != "cpu" else None


def uses_dropout(config: RunConfig) -> bool:
    """Whether the forward pass of training draws random numbers."""
    return config.model.dropout > 0 or (config.adapter is not None and config.adapter.dropout > 0)
