"""Forward and backward pass of a batch: with all layers on every device, or through a pipeline.

    engines = single_stage_engines(config, mesh, graph)        # or pipelined_engines(config, mesh, graph, plan)
    sums = engines.train(params, frozen, batch, keys)

An engine returns sums over the rows of the batch (`parallel/gradients.py`); the step divides them once.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...configs.run import RunConfig
from ...models.decoder import decoder_graphdef
from ...parallel.gradients import Batch, Engine, Loss, accumulate_gradients, plain_engine
from ...parallel.pipeline.executor.stage_functions import StageFunctions
from ...parallel.pipeline.tables.lowering import lower_table
from ...parallel.pipeline.tables.table import Table
from ...parallel.sharding import constrainer
from ...parallel.state import combine
from ..objectives import distillation, loss_heads
from ..objectives.interface import RecipeLoss
from ..objectives.loss_heads import LossHead, TokenValues
from ..objectives.registry import RECIPES
from . import fisher
from .block_context import local_context, make_context
from .deterministic_reduce import tree_ordered_engine
from .model_structure import partition_params
from .multi_adapter import make_multi_adapter
from .pipeline import stages
from .pipeline.pipeline_plan import PipelinePlan
from .privacy.dp_sgd import clipped_engine, make_squared_norms

Evaluate = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight


class Engines(NamedTuple):
    """The functions of a batch: gradients to train with, sums to evaluate."""

    train: Engine
    evaluate: Evaluate
    measures: Mapping[str, Evaluate] = {}  # further metrics of held-out text, by name
    squared_gradients: Engine | None = None  # sums of squares of single examples' gradients, for fishmask


def single_stage_engines(config: RunConfig, mesh: Mesh, graph: Any) -> Engines:
    """Engines that compute all layers on every device."""
    recipe = RECIPES[config.recipe.name]
    recipe_loss, measures = recipe.loss(config.recipe), recipe.measures
    context, one_device = partial(make_context, config, mesh), partial(local_context, config, mesh)
    loss_with_teacher = partial(distillation.loss_with_teacher, config, graph, context=context)
    make_values = partial(loss_heads.values_fn, token_values(config), graph)
    if adapters := make_multi_adapter(config):
        make_values, recipe_loss = adapters.values(make_values), adapters.loss(recipe_loss)
        measures = {name: adapters.loss(measure) for name, measure in measures.items()}
    values = make_values(context=context)
    loss = training_loss = loss_heads.make_loss(values, recipe_loss, measures)
    if config.recipe.compares_distributions:
        training_loss = loss_with_teacher(distillation.distillation_head(config))

    evaluate = without_dropout(lambda params, frozen, *rest: loss(params, distillation.without_teacher(frozen), *rest))
    evaluated = {name: evaluate_measure(values, measure) for name, measure in measures.items()}
    if distillation.teacher_of(config) is not None:
        evaluated["acceptance"] = without_dropout(loss_with_teacher(distillation.acceptance_head(config)))
    dtype = jnp.dtype(config.precision.gradients)
    accumulate = partial(accumulate_gradients, microbatches=config.microbatches)
    if config.privacy is not None:
        norms = make_squared_norms(graph, recipe_loss, model=config.model, adapter=config.adapter, context=one_device)
        clipped = clipped_engine(values, recipe_loss, squared_norms=norms, clip=config.privacy.clip, dtype=dtype)
        return Engines(accumulate(clipped), evaluate, evaluated)
    if config.elastic.deterministic:
        training_loss = loss_heads.make_loss(make_values(context=one_device), recipe_loss, measures)
        accumulate = partial(tree_ordered_engine, mesh=mesh, microbatches=config.microbatches)
    squared_gradients = None
    if config.adapter is not None and config.adapter.method == "fishmask":
        segments = 1 if recipe.unit == "token" else 2  # an example is a document, or a pair of responses
        squares = fisher.per_example_squared_gradients(training_loss, segments=segments)
        if config.elastic.deterministic:
            squared_gradients = accumulate(fisher.single_device_engine(squares, segments=segments))
        else:
            squared_gradients = fisher.shard_over_data(squares, segments=segments, mesh=mesh)
    return Engines(accumulate(plain_engine(training_loss, dtype=dtype)), evaluate, evaluated, squared_gradients)


def evaluate_measure(values: Callable[..., jax.Array], measure: RecipeLoss) -> Evaluate:
    """(params, frozen, batch) -> the sums of `measure` over the per-token `values`."""
    return lambda params, frozen, batch: measure(values(params, frozen, batch, None), batch)


def without_dropout(loss: Loss) -> Evaluate:
    """(params, frozen, batch) -> numerator and weight of `loss`, without dropout."""

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        numerator, (weight, _) = loss(params, frozen, batch, None)
        return numerator, weight

    return evaluate


def token_values(config: RunConfig) -> TokenValues:
    """The per-token values that the recipe's loss reads: reward scores, or log p of the targets."""
    if RECIPES[config.recipe.name].uses_scores:
        return loss_heads.reward_scores
    return loss_heads.target_logprobs(config.model, config.memory)


def training_head(config: RunConfig) -> LossHead:
    """The loss head of the training loss."""
    recipe = RECIPES[config.recipe.name]
    if config.recipe.compares_distributions:
        return distillation.distillation_head(config)
    return loss_heads.make_loss_head(token_values(config), recipe.loss(config.recipe), recipe.measures)


def pipelined_engines(config: RunConfig, mesh: Mesh, graph: Any, plan: PipelinePlan) -> Engines:
    """Engines for a pipeline: each device along `pipe` holds some of the layers."""
    recipe, teacher = RECIPES[config.recipe.name], pipelined_teacher(config, mesh, plan)
    recipe_loss = recipe.loss(config.recipe)

    def make_engine(table: Table, loss_head: LossHead, teacher: stages.Teacher | None) -> Engine:
        return stages.make_engine(
            make_stage_functions(config, mesh, graph, loss_head),
            lower_table(table, repeats=plan.repeats),
            repeats=plan.max_repeats,
            mesh=mesh,
            zero=config.mesh.zero,
            compute=jnp.dtype(config.precision.compute),
            dtype=jnp.dtype(config.precision.gradients),
            teacher=teacher,
        )

    def make_evaluate(loss_head: LossHead, teacher: stages.Teacher | None = None) -> Evaluate:
        forward = make_engine(plan.forward, loss_head, teacher)

        def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            sums = forward(params, frozen, batch, None)
            return sums.loss, sums.weight

        return evaluate

    loss_head = partial(loss_heads.make_loss_head, token_values(config))
    measures = {name: make_evaluate(loss_head(measure)) for name, measure in recipe.measures.items()}
    if teacher is not None:
        measures["acceptance"] = make_evaluate(distillation.acceptance_head(config), teacher)
    train = make_engine(plan.table, training_head(config), teacher)
    if config.pipeline.post_validation:
        train = stages.with_batch_weight(train, recipe_loss)
    return Engines(train, make_evaluate(loss_head(recipe_loss)), measures)


def pipelined_teacher(config: RunConfig, mesh: Mesh, plan: PipelinePlan) -> stages.Teacher | None:
    """The teacher in a forward-only pipeline of its own; None without a teacher."""
    model, teacher_plan = distillation.teacher_of(config), plan.teacher
    if model is None or teacher_plan is None:
        return None
    shapes = jax.eval_shape(partial(distillation.init_weights, config, model))
    functions = stages.make_stage_functions(
        decoder_graphdef(model), shapes, model=model, **stage_settings(config, mesh)
    )
    lowered = lower_table(teacher_plan.table, repeats=teacher_plan.repeats)
    return stages.make_teacher(functions, lowered, repeats=teacher_plan.max_repeats, mesh=mesh)


def make_stage_functions(
    config: RunConfig, mesh: Mesh, graph: Any, loss_head: LossHead | None = None
) -> StageFunctions:
    """The model split into the functions of a pipeline stage. `loss_head` defaults to that of the training loss."""

    def create_weights() -> Any:
        params, frozen = partition_params(config)
        return combine(params, distillation.without_teacher(frozen))

    return stages.make_stage_functions(
        graph,
        jax.eval_shape(create_weights),
        model=config.model,
        recipe=RECIPES[config.recipe.name].loss(config.recipe),
        loss_head=training_head(config) if loss_head is None else loss_head,
        teacher=distillation.teacher_of(config),
        **stage_settings(config, mesh),
    )


def stage_settings(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Arguments of `stages.make_stage_functions` that the model and its teacher have in common."""
    compute = jnp.dtype(config.precision.compute)
    return {"context": partial(make_context, config, mesh), "constrain": constrainer(mesh), "compute": compute}
