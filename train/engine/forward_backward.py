"""Forward and backward pass of a batch: with all layers on every device, or through a pipeline.

    engines = single_stage_engines(config, mesh, graph)        # or pipelined_engines(config, mesh, graph, plan)
    sums = engines.train(params, frozen, batch, keys)

This module also builds the model's structure and parameters, and the `Context` that every block gets.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...configs.adapter_runs import resolve_adapters
from ...configs.names import ADAPTER_IDS_FIELD
from ...configs.run import RunConfig
from ...memory import policy
from ...models.adapters import multi_lora
from ...models.adapters.attach import adapter_inserter, init_adapters, split_trained
from ...models.context import Context, flat_linear, linear, no_constraint
from ...models.decoder import Decoder, decoder_graphdef
from ...models.quantized_model import make_fake_quantize, quantize_frozen, quantized_kernel_inserter
from ...models.reward_head import RewardHead, init_reward_head
from ...parallel.attention import sharded_attention, token_order
from ...parallel.gradients import Batch, Engine, Loss, accumulate_gradients, plain_engine
from ...parallel.pipeline.executor.stage_functions import StageFunctions
from ...parallel.pipeline.tables.lowering import lower_table
from ...parallel.pipeline.tables.table import Table
from ...parallel.prng import init_key
from ...parallel.sharding import constrainer
from ...parallel.state import combine
from ...parallel.vocabulary import embedding_lookup
from ..objectives import distillation, loss_heads
from ..objectives.interface import RecipeLoss
from ..objectives.loss_heads import LossHead, TokenValues
from ..objectives.registry import RECIPES
from . import fisher
from .deterministic_reduce import tree_ordered_engine
from .multi_adapter import make_multi_adapter, sharded_product
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


def model_graphdef(config: RunConfig) -> Any:
    """The model's nnx graphdef, with adapters next to its kernels, and quantized kernels in place of frozen ones."""
    if config.adapters:
        insert_adapters = multi_lora.adapter_inserter(config.model, resolve_adapters(config))
    else:
        insert_adapters = adapter_inserter(config.model, config.adapter)
    _, frozen = jax.eval_shape(lambda: partition_params(config))
    insert_kernels = quantized_kernel_inserter(config.model, config.quantization, distillation.without_teacher(frozen))

    def change(decoder: Decoder) -> None:
        insert_adapters(decoder)
        insert_kernels(decoder)
        if RECIPES[config.recipe.name].uses_scores:
            decoder.score = RewardHead(config.model.embed)

    return decoder_graphdef(config.model, change)


def partition_params(config: RunConfig, weights: Any = None, teacher: Any = None) -> tuple[Any, Any]:
    """Return (trained, frozen) parameters of the model that starts from `weights` (None: from the seed).

    Adapters are added and frozen kernels quantized. `teacher` are the weights of a teacher of another model; None gives
    it random ones, for shapes only.
    """
    if weights is None:
        weights = distillation.init_weights(config)
    key = jax.random.fold_in(init_key(config), 2)
    if config.adapters:
        adapted = multi_lora.init_adapters(weights, config.model, resolve_adapters(config), key)
        params, frozen = multi_lora.split_trained(adapted, config.model, resolve_adapters(config))
    else:
        adapted = weights
        if config.adapter is not None:
            fake_quantize = make_fake_quantize(config.quantization)
            adapted = init_adapters(weights, config.model, config.adapter, key, fake_quantize=fake_quantize)
        params, frozen = split_trained(adapted, config.model, config.adapter)
    if RECIPES[config.recipe.name].uses_scores:
        params = params | {"score": init_reward_head(config.model.embed, jax.random.fold_in(init_key(config), 3))}
    frozen = quantize_frozen(frozen, config.model, config.quantization)
    return params, distillation.with_teacher(frozen, config, initial_weights=weights, teacher_weights=teacher)


def local_context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """The context of blocks whose rows are computed whole by one device of `mesh`."""
    local_mesh = Mesh(mesh.devices.reshape(-1)[:1].reshape([1] * mesh.devices.ndim), mesh.axis_names)
    lookup = partial(embedding_lookup, constrain=no_constraint)
    return dataclasses.replace(make_context(config, local_mesh, batch, keys), constrain=no_constraint, lookup=lookup)


def make_context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """The context that every block gets for one batch on `mesh`. `keys` [rows] are for dropout; None: no dropout."""
    decisions = policy.tensor_decisions(config.memory, tensors=policy.emitted_tensors(config.model))
    constrain = constrainer(mesh)
    order = token_order(batch["tokens"].shape[1], mesh=mesh, strategy=config.sequence.parallel)
    return Context(
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        index=None if order is None else jnp.asarray(order),
        dropout_keys=keys,
        adapter_ids=batch[ADAPTER_IDS_FIELD][:, 0] if config.adapters else None,
        adapter_product=sharded_product(config.adapter.product, mesh) if config.adapters else None,
        attend=sharded_attention(config.model.attention, mesh=mesh, strategy=config.sequence.parallel),
        linear=flat_linear if mesh.shape["seq"] == 1 else linear,
        lookup=partial(embedding_lookup, constrain=constrain),
        constrain=constrain,
        remat=policy.make_remat(decisions, scanned=config.model.scan),
        compute_dtype=jnp.dtype(config.precision.compute),
    )
