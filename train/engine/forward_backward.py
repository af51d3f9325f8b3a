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
from ...models.adapters.attach import attached, split, started
from ...models.context import Context, flat_linear, linear, unconstrained
from ...models.decoder import Decoder
from ...models.decoder import graph as decoder_graph
from ...models.quantized_model import put, quantized, reading
from ...models.reward_head import Score
from ...models.reward_head import started as score
from ...parallel.attention import sharded_attention, token_order
from ...parallel.gradients import Batch, Engine, Loss, accumulated, plain
from ...parallel.pipeline.executor.stage_functions import Parts
from ...parallel.pipeline.tables.lowering import wired
from ...parallel.pipeline.tables.table import Table
from ...parallel.prng import of_weights
from ...parallel.sharding import constrainer
from ...parallel.state import combine
from ...parallel.vocabulary import lookup
from ..objectives import interface as recipes
from ..objectives.distillation import (
    acceptance,
    beside_teacher,
    fresh_weights,
    taught,
    teacher_of,
    with_teacher,
    without_teacher,
)
from ..objectives.loss_heads import Ending, Values, by_parameters, ending, make_loss, scores, target_logprobs
from ..objectives.registry import RECIPES
from . import fisher
from .deterministic_reduce import in_fixed_order
from .multi_adapter import product_on, several_of
from .pipeline import stages
from .pipeline.pipeline_plan import Staging
from .privacy.dp_sgd import make_norms, private

Evaluate = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight


class Engines(NamedTuple):
    """What is computed of a batch: gradients to train, sums to evaluate."""

    train: Engine
    evaluate: Evaluate
    measures: Mapping[str, Evaluate] = {}  # what else is told of held-out text
    squares: Engine | None = None  # of single examples' gradients, where an adapter chooses by them


def whole(config: RunConfig, mesh: Mesh, graph: Any) -> Engines:
    """Every device computes with all layers."""
    kind = RECIPES[config.recipe.name]
    recipe, measures = kind.loss(config.recipe), kind.measures
    told = partial(context, config, mesh)
    values = partial(by_parameters, values_of(config))
    if lift := several_of(config):
        values, recipe = lift.values(values), lift.loss(recipe)
        measures = {name: lift.loss(measure) for name, measure in measures.items()}
    loss = make_loss(values(graph, context=told), recipe, measures)
    learned = beside_teacher(config, graph, taught(config), told=told) if config.recipe.compares_words else loss

    evaluate = evaluated(lambda params, frozen, *rest: loss(params, without_teacher(frozen), *rest))
    further = {name: measured(values(graph, context=told), measure) for name, measure in measures.items()}
    if teacher_of(config) is not None:
        further["acceptance"] = evaluated(beside_teacher(config, graph, acceptance(config), told=told))
    dtype = jnp.dtype(config.precision.gradients)
    if config.privacy is not None:
        free = partial(context_alone, config, mesh)
        norms = make_norms(graph, recipe, model=config.model, adapter=config.adapter, alone=free)
        clipped = private(
            values(graph, context=told), recipe, squared_norms=norms, clip=config.privacy.clip, dtype=dtype
        )
        return Engines(accumulated(clipped, microbatches=config.microbatches), evaluate, further)
    if config.elastic.deterministic:
        alone = make_loss(values(graph, context=partial(context_alone, config, mesh)), recipe, measures)
        fixed = partial(in_fixed_order, mesh=mesh, microbatches=config.microbatches)
        squares = by_example(config, alone, lambda found, segments: fixed(fisher.whole(found, segments=segments)))
        return Engines(fixed(plain(alone, dtype=dtype)), evaluate, further, squares)
    squares = by_example(config, learned, partial(fisher.spread, mesh=mesh))
    engine = accumulated(plain(learned, dtype=dtype), microbatches=config.microbatches)
    return Engines(engine, evaluate, further, squares)


def by_example(config: RunConfig, loss: Loss, spread: Callable[..., Engine]) -> Engine | None:
    """Squares of the gradients of single examples, where the adapter chooses by them. An answer is one of a pair."""
    if config.adapter is None or config.adapter.method != "fishmask":
        return None
    segments = 1 if RECIPES[config.recipe.name].unit == "token" else 2
    return spread(fisher.squared(loss, segments=segments), segments=segments)


def measured(values: Callable[..., jax.Array], measure: recipes.Loss) -> Evaluate:
    """A measure of what `values` says, by parameters."""
    return lambda params, frozen, batch: measure(values(params, frozen, batch, None), batch)


def evaluated(loss: Loss) -> Evaluate:
    """The sums of `loss`, nothing dropped out."""

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        numerator, (weight, _) = loss(params, frozen, batch, None)
        return numerator, weight

    return evaluate


def values_of(config: RunConfig) -> Values:
    """What the recipe's loss is of: a number for each token."""
    return scores if RECIPES[config.recipe.name].scored else target_logprobs(config.model, config.memory)


def ending_of(config: RunConfig) -> Ending:
    """What is made of the last hidden states to train."""
    kind = RECIPES[config.recipe.name]
    if config.recipe.compares_words:
        return taught(config)
    return ending(values_of(config), kind.loss(config.recipe), kind.measures)


def pipelined(config: RunConfig, mesh: Mesh, graph: Any, staging: Staging) -> Engines:
    """Devices along `pipe` hold some layers each."""
    kind, teacher = RECIPES[config.recipe.name], teacher_in(config, mesh, staging)
    values = values_of(config)

    def engine(table: Table, ending: Ending, teacher: stages.Teacher | None) -> Engine:
        return stages.make_engine(
            parts(config, mesh, graph, ending),
            wired(table, repeats=staging.repeats),
            repeats=staging.most,
            mesh=mesh,
            zero=config.mesh.zero,
            compute=jnp.dtype(config.precision.compute),
            dtype=jnp.dtype(config.precision.gradients),
            teacher=teacher,
        )

    def evaluate(ending: Ending, teacher: stages.Teacher | None = None) -> Evaluate:
        forward = engine(staging.forward, ending, teacher)

        def sums(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            found = forward(params, frozen, batch, None)
            return found.loss, found.weight

        return sums

    further = {name: evaluate(ending(values, measure)) for name, measure in kind.measures.items()}
    if teacher is not None:
        further["acceptance"] = evaluate(acceptance(config), teacher)
    train = engine(staging.table, ending_of(config), teacher)
    if config.pipeline.post_validation:
        train = stages.weighed(train, kind.loss(config.recipe))
    return Engines(train, evaluate(ending(values, kind.loss(config.recipe))), further)


def teacher_in(config: RunConfig, mesh: Mesh, staging: Staging) -> stages.Teacher | None:
    """The teacher, through a pipeline of its own; None where there is none."""
    model, own = teacher_of(config), staging.teacher
    if model is None or own is None:
        return None
    shapes = jax.eval_shape(partial(fresh_weights, model, config))
    cut = stages.parts(decoder_graph(model), shapes, model=model, **surroundings(config, mesh))
    return stages.make_teacher(cut, wired(own.table, repeats=own.repeats), repeats=own.most, mesh=mesh)


def parts(config: RunConfig, mesh: Mesh, graph: Any, ending: Ending | None = None) -> Parts:
    """The model as a pipeline cuts it; `ending` is that of training by default."""

    def weights() -> Any:
        params, frozen = divided(config, fresh(config))
        return combine(params, without_teacher(frozen))

    return stages.parts(
        graph,
        jax.eval_shape(weights),
        model=config.model,
        recipe=RECIPES[config.recipe.name].loss(config.recipe),
        ending=ending_of(config) if ending is None else ending,
        teacher=teacher_of(config),
        **surroundings(config, mesh),
    )


def surroundings(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """What every model of the run is told, in a pipeline."""
    compute = jnp.dtype(config.precision.compute)
    return {"context": partial(context, config, mesh), "constrain": constrainer(mesh), "compute": compute}


def fresh(config: RunConfig) -> Any:
    """Random weights of the whole model, by the seed."""
    return fresh_weights(config.model, config)


def structure(config: RunConfig) -> Any:
    """The model's structure, with adapters beside its kernels and quantized kernels in the place of others."""
    if config.adapters:
        adapters = multi_lora.attached(config.model, adapters_of(config))
    else:
        adapters = attached(config.model, config.adapter)
    kernels = put(
        config.model, config.quantization, without_teacher(jax.eval_shape(lambda: divided(config, fresh(config)))[1])
    )

    def all_of_it(decoder: Decoder) -> None:
        adapters(decoder)
        kernels(decoder)
        if RECIPES[config.recipe.name].scored:
            decoder.score = Score(config.model.embed)

    return decoder_graph(config.model, all_of_it)


def divided(config: RunConfig, weights: Any, teacher: Any = None) -> tuple[Any, Any]:
    """(what is trained, what is not) of the model that starts from `weights`: adapters added, the rest quantized.

    `teacher` are the weights of a teacher from elsewhere; None: for shapes alone, where there is one.
    """
    given, key = weights, jax.random.fold_in(of_weights(config), 2)
    if config.adapters:
        given = multi_lora.started(weights, config.model, adapters_of(config), key)
        params, frozen = multi_lora.split(given, config.model, adapters_of(config))
    else:
        if config.adapter is not None:
            given = started(weights, config.model, config.adapter, key, read=reading(config.quantization))
        params, frozen = split(given, config.model, config.adapter)
    if RECIPES[config.recipe.name].scored:
        params = params | {"score": score(config.model.embed, jax.random.fold_in(of_weights(config), 3))}
    frozen = quantized(frozen, config.model, config.quantization)
    return params, with_teacher(frozen, config, own=weights, given=teacher)


def context_alone(config: RunConfig, mesh: Mesh, batch: Batch, keys: jax.Array | None) -> Context:
    """What the blocks are told on one device of `mesh`, which computes whole rows by itself."""
    one = Mesh(mesh.devices.reshape(-1)[:1].reshape([1] * mesh.devices.ndim), mesh.axis_names)
    free = partial(lookup, constrain=unconstrained)
    return dataclasses.replace(context(config, one, batch, keys), constrain=unconstrained, lookup=free)


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
        adapters=batch[ADAPTER_FIELD][:, 0] if config.adapters else None,
        product=product_on(config.adapter.product, mesh) if config.adapters else None,
        attend=sharded_attention(config.model.attention, mesh=mesh, strategy=config.sequence.parallel),
        linear=flat_linear if mesh.shape["seq"] == 1 else linear,
        lookup=partial(lookup, constrain=constrain),
        constrain=constrain,
        remat=policy.rematerialized(chosen, scanned=config.model.scan),
        compute=jnp.dtype(config.precision.compute),
    )
