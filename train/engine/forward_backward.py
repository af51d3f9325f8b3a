"""How a batch is computed: by all layers on every device, or through a pipeline. And what the blocks are told.

engines = whole(config, mesh, graph)        # or pipelined(config, mesh, graph, staging)
sums = engines.train(params, frozen, batch, keys)
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...configs.adapter_runs import adapters_of
from ...configs.names import ADAPTER_FIELD
from ...configs.run import RunConfig
from ...memory import policy
from ...models.adapters import multi_lora
from ...models.adapters.attach import adapter_inserter, init_adapters, split_trained
from ...models.context import Context, flat_linear, linear, unconstrained
from ...models.decoder import Decoder
from ...models.decoder import decoder_graphdef as decoder_graph
from ...models.quantized_model import make_fake_quantize, quantize_frozen, quantized_kernel_inserter
from ...models.reward_head import RewardHead
from ...models.reward_head import init_reward_head as score
from ...parallel.attention import sharded_attention, token_order
from ...parallel.gradients import Batch, Engine, Loss, accumulate_gradients, plain_engine
from ...parallel.pipeline.executor.stage_functions import StageFunctions
from ...parallel.pipeline.tables.lowering import lower_table
from ...parallel.pipeline.tables.table import Table
from ...parallel.prng import init_key
from ...parallel.sharding import constrainer
from ...parallel.state import combine
from ...parallel.vocabulary import embedding_lookup
from ..objectives import interface as recipes
from ..objectives.distillation import (
    acceptance_head,
    distillation_head,
    init_weights,
    loss_with_teacher,
    teacher_of,
    with_teacher,
    without_teacher,
)
from ..objectives.loss_heads import (
    LossHead,
    TokenValues,
    make_loss,
    make_loss_head,
    reward_scores,
    target_logprobs,
    values_fn,
)
from ..objectives.registry import RECIPES
from . import fisher
from .deterministic_reduce import tree_ordered_engine
from .multi_adapter import make_multi_adapter, sharded_product
from .pipeline import stages
from .pipeline.pipeline_plan import PipelinePlan
from .privacy.dp_sgd import clipped_engine, make_norms

Evaluate = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight


class Engines(NamedTuple):
    """What is computed of a batch: gradients to train, sums to evaluate."""

    train: Engine
    evaluate: Evaluate
    measures: Mapping[str, Evaluate] = {}  # what else is told of held-out text
    squared_gradients: Engine | None = None  # of single examples' gradients, where an adapter chooses by them


def single_stage_engines(config: RunConfig, mesh: Mesh, graph: Any) -> Engines:
    """Every device computes with all layers."""
    kind = RECIPES[config.recipe.name]
    recipe, measures = kind.loss(config.recipe), kind.measures
    told = partial(make_context, config, mesh)
    values = partial(values_fn, token_values(config))
    if lift := make_multi_adapter(config):
        values, recipe = lift.values(values), lift.loss(recipe)
        measures = {name: lift.loss(measure) for name, measure in measures.items()}
    loss = make_loss(values(graph, context=told), recipe, measures)
    learned = (
        loss_with_teacher(config, graph, distillation_head(config), context=told)
        if config.recipe.compares_words
        else loss
    )

    evaluate = without_dropout(lambda params, frozen, *rest: loss(params, without_teacher(frozen), *rest))
    further = {name: measured(values(graph, context=told), measure) for name, measure in measures.items()}
    if teacher_of(config) is not None:
        further["acceptance"] = without_dropout(loss_with_teacher(config, graph, acceptance_head(config), context=told))
    dtype = jnp.dtype(config.precision.gradients)
    if config.privacy is not None:
        free = partial(local_context, config, mesh)
        norms = make_norms(graph, recipe, model=config.model, adapter=config.adapter, context=free)
        clipped = clipped_engine(
            values(graph, context=told), recipe, squared_norms=norms, clip=config.privacy.clip, dtype=dtype
        )
        return Engines(accumulate_gradients(clipped, microbatches=config.microbatches), evaluate, further)
    if config.elastic.deterministic:
        alone = make_loss(values(graph, context=partial(local_context, config, mesh)), recipe, measures)
        fixed = partial(tree_ordered_engine, mesh=mesh, microbatches=config.microbatches)
        squares = per_example_engine(
            config, alone, lambda found, segments: fixed(fisher.single_device_engine(found, segments=segments))
        )
        return Engines(fixed(plain_engine(alone, dtype=dtype)), evaluate, further, squares)
    squares = per_example_engine(config, learned, partial(fisher.shard_over_data, mesh=mesh))
    engine = accumulate_gradients(plain_engine(learned, dtype=dtype), microbatches=config.microbatches)
    return Engines(engine, evaluate, further, squares)


def per_example_engine(config: RunConfig, loss: Loss, spread: Callable[..., Engine]) -> Engine | None:
    """Squares of the gradients of single examples, where the adapter chooses by them. An answer is one of a pair."""
    if config.adapter is None or config.adapter.method != "fishmask":
        return None
    segments = 1 if RECIPES[config.recipe.name].unit == "token" else 2
    return spread(fisher.per_example_squared_gradients(loss, segments=segments), segments=segments)


def measured(values: Callable[..., jax.Array], measure: recipes.Loss) -> Evaluate:
    """A measure of what `values` says, by parameters."""
    return lambda params, frozen, batch: measure(values(params, frozen, batch, None), batch)


def without_dropout(loss: Loss) -> Evaluate:
    """The sums of `loss`, nothing dropped out."""

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        numerator, (weight, _) = loss(params, frozen, batch, None)
        return numerator, weight

    return evaluate


def token_values(config: RunConfig) -> TokenValues:
    """What the recipe's loss is of: a number for each token."""
    return reward_scores if RECIPES[config.recipe.name].scored else target_logprobs(config.model, config.memory)


def training_head(config: RunConfig) -> LossHead:
    """What is made of the last hidden states to train."""
    kind = RECIPES[config.recipe.name]
    if config.recipe.compares_words:
        return distillation_head(config)
    return make_loss_head(token_values(config), kind.loss(config.recipe), kind.measures)


def pipelined_engines(config: RunConfig, mesh: Mesh, graph: Any, staging: PipelinePlan) -> Engines:
    """Devices along `pipe` hold some layers each."""
    kind, teacher = RECIPES[config.recipe.name], pipelined_teacher(config, mesh, staging)
    values = token_values(config)

    def engine(table: Table, ending: LossHead, teacher: stages.Teacher | None) -> Engine:
        return stages.make_engine(
            make_stage_functions(config, mesh, graph, ending),
            lower_table(table, repeats=staging.repeats),
            repeats=staging.max_repeats,
            mesh=mesh,
            zero=config.mesh.zero,
            compute=jnp.dtype(config.precision.compute),
            dtype=jnp.dtype(config.precision.gradients),
            teacher=teacher,
        )

    def evaluate(ending: LossHead, teacher: stages.Teacher | None = None) -> Evaluate:
        forward = engine(staging.forward, ending, teacher)

        def sums(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            found = forward(params, frozen, batch, None)
            return found.loss, found.weight

        return sums

    further = {name: evaluate(make_loss_head(values, measure)) for name, measure in kind.measures.items()}
    if teacher is not None:
        further["acceptance"] = evaluate(acceptance_head(config), teacher)
    train = engine(staging.table, training_head(config), teacher)
    if config.pipeline.post_validation:
        train = stages.with_batch_weight(train, kind.loss(config.recipe))
    return Engines(train, evaluate(make_loss_head(values, kind.loss(config.recipe))), further)


def pipelined_teacher(config: RunConfig, mesh: Mesh, staging: PipelinePlan) -> stages.Teacher | None:
    """The teacher, through a pipeline of its own; None where there is none."""
    model, own = teacher_of(config), staging.teacher
    if model is None or own is None:
        return None
    shapes = jax.eval_shape(partial(init_weights, model, config))
    cut = stages.make_stage_functions(decoder_graph(model), shapes, model=model, **surroundings(config, mesh))
    return stages.make_teacher(cut, lower_table(own.table, repeats=own.repeats), repeats=own.max_repeats, mesh=mesh)


def make_stage_functions(config: RunConfig, mesh: Mesh, graph: Any, ending: LossHead | None = None) -> StageFunctions:
    """The model as a pipeline cuts it; `ending` is that of training by default."""

    def weights() -> Any:
        params, frozen = partition_params(config, init_params(config))
        return combine(params, without_teacher(frozen))

    return stages.make_stage_functions(
        graph,
        jax.eval_shape(weights),
        model=config.model,
        recipe=RECIPES[config.recipe.name].loss(config.recipe),
        ending=training_head(config) if ending is None else ending,
        teacher=teacher_of(config),
        **surroundings(config, mesh),
    )


def surroundings(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """What every model of the run is told, in a pipeline."""
    compute = jnp.dtype(config.precision.compute)
    return {"context": partial(make_context, config, mesh), "constrain": constrainer(mesh), "compute": compute}


def init_params(config: RunConfig) -> Any:
    """Random weights of the whole model, by the seed."""
    return init_weights(config.model, config)


def model_graphdef(config: RunConfig) -> Any:
    """The model's structure, with adapters beside its kernels and quantized kernels in the place of others."""
    if config.adapters:
        adapters = multi_lora.adapter_inserter(config.model, adapters_of(config))
    else:
        adapters = adapter_inserter(config.model, config.adapter)
    kernels = quantized_kernel_inserter(
        config.model,
        config.quantization,
        without_teacher(jax.eval_shape(lambda: partition_params(config, init_params(config)))[1]),
    )

    def all_of_it(decoder: Decoder) -> None:
        adapters(decoder)
        kernels(decoder)
        if RECIPES[config.recipe.name].scored:
            decoder.score = RewardHead(config.model.embed)

    return decoder_graph(config.model, all_of_it)


def partition_params(config: RunConfig, weights: Any, teacher: Any = None) -> tuple[Any, Any]:
    """(what is trained, what is not) of the model that starts from `weights`: adapters added, the rest quantized.

    `teacher` are the weights of a teacher from elsewhere; None: for shapes alone, where there is one.
    """
    given, key = weights, jax.random.fold_in(init_key(config), 2)
    if config.adapters:
        given = multi_lora.init_adapters(weights, config.model, adapters_of(config), key)
        params, frozen = multi_lora.split_trained(given, config.model, adapters_of(config))
    else:
        if config.adapter is not None:
            given = init_adapters(
                weights, config.model, config.adapter, key, fake_quantize=make_fake_quantize(config.quantization)
            )
        params, frozen = split_trained(given, config.model, config.adapter)
    if RECIPES[config.recipe.name].scored:
        params = params | {"score": score(config.model.embed, jax.random.fold_in(init_key(config), 3))}
    frozen = quantize_frozen(frozen, config.model, config.quantization)
    return params, with_teacher(frozen, config, own=weights, given=teacher)


def local_context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """What the blocks are told on one device of `mesh`, which computes whole rows by itself."""
    one = Mesh(mesh.devices.reshape(-1)[:1].reshape([1] * mesh.devices.ndim), mesh.axis_names)
    free = partial(embedding_lookup, constrain=unconstrained)
    return dataclasses.replace(make_context(config, one, batch, keys), constrain=unconstrained, lookup=free)


def make_context(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """What the blocks are told for one batch on one mesh."""
    chosen = policy.tensor_decisions(config.memory, tensors=policy.emitted_tensors(config.model))
    constrain = constrainer(mesh)
    order = token_order(batch["tokens"].shape[1], mesh=mesh, strategy=config.sequence.parallel)
    return Context(
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        index=None if order is None else jnp.asarray(order),
        dropout_keys=keys,
        adapter_ids=batch[ADAPTER_FIELD][:, 0] if config.adapters else None,
        adapter_product=sharded_product(config.adapter.product, mesh) if config.adapters else None,
        attend=sharded_attention(config.model.attention, mesh=mesh, strategy=config.sequence.parallel),
        linear=flat_linear if mesh.shape["seq"] == 1 else linear,
        lookup=partial(embedding_lookup, constrain=constrain),
        constrain=constrain,
        remat=policy.make_remat(chosen, scanned=config.model.scan),
        compute_dtype=jnp.dtype(config.precision.compute),
    )
