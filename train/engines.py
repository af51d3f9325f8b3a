"""How a batch is computed: by all layers on every device, or through a pipeline. And what the blocks are told.

engines = whole(config, mesh, graph)        # or pipelined(config, mesh, graph, staging)
sums = engines.train(params, frozen, batch, keys)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..configs.run import RunConfig
from ..memory import policy
from ..models.adapters.attach import attached, split, started
from ..models.context import Context, flat_linear, linear
from ..models.decoder import Decoder, graph, initial_params
from ..models.quantized.attach import put, quantized, reading
from ..parallel.attention import sharded_attention, token_order
from ..parallel.pipeline.table import Table
from ..parallel.pipeline.wiring import wired
from ..parallel.rules import constrainer
from ..parallel.state import combine
from ..parallel.vocabulary import lookup
from . import pipeline
from .gradients import Batch, Engine, accumulated, plain
from .recipes.registry import RECIPES
from .repair import repair_loss, without_teacher
from .staging import Staging
from .step import make_loss


class Engines(NamedTuple):
    """What is computed of a batch: gradients to train, sums to evaluate."""

    train: Engine
    evaluate: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]  # (params, frozen, batch) -> numerator, weight


def whole(config: RunConfig, mesh: Mesh, graph: Any) -> Engines:
    """Every device computes with all layers."""
    settings = {"model": config.model, "memory": config.memory, "context": partial(context, config, mesh)}
    repairs = config.recipe.name == "lrec"
    plain_loss = make_loss(graph, RECIPES["pretrain" if repairs else config.recipe.name], **settings)
    train_loss = repair_loss(graph, **settings) if repairs else plain_loss

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        numerator, (weight, _) = plain_loss(params, without_teacher(frozen), batch, None)
        return numerator, weight

    one = plain(train_loss, dtype=jnp.dtype(config.precision.gradients))
    return Engines(accumulated(one, microbatches=config.microbatches), evaluate)


def pipelined(config: RunConfig, mesh: Mesh, graph: Any, staging: Staging) -> Engines:
    """Devices along `pipe` hold some layers each."""
    cut = pipeline.parts(
        graph,
        jax.eval_shape(lambda: combine(*divided(config, fresh(config)))),
        RECIPES[config.recipe.name],
        model=config.model,
        memory=config.memory,
        context=partial(context, config, mesh),
        constrain=constrainer(mesh),
        compute=jnp.dtype(config.precision.compute),
    )

    def engine(table: Table) -> Engine:
        return pipeline.make_engine(
            cut,
            wired(table, repeats=staging.repeats),
            repeats=staging.most,
            mesh=mesh,
            zero=config.mesh.zero,
            compute=jnp.dtype(config.precision.compute),
            dtype=jnp.dtype(config.precision.gradients),
        )

    forward = engine(staging.forward)

    def evaluate(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = forward(params, frozen, batch, None)
        return sums.loss, sums.weight

    return Engines(engine(staging.table), evaluate)


def fresh(config: RunConfig) -> Any:
    """Random weights of the whole model, by the seed."""
    return initial_params(config.model, jax.random.key(config.seed), jnp.dtype(config.precision.parameters))


def structure(config: RunConfig) -> Any:
    """The model's structure, with adapters beside its kernels and quantized kernels in the place of others."""
    adapters = attached(config.model, config.adapter)
    kernels = put(
        config.model, config.quantization, without_teacher(jax.eval_shape(lambda: divided(config, fresh(config)))[1])
    )

    def all_of_it(decoder: Decoder) -> None:
        adapters(decoder)
        kernels(decoder)

    return graph(config.model, all_of_it)


def divided(config: RunConfig, weights: Any) -> tuple[Any, Any]:
    """(what is trained, what is not) of the model that starts from `weights`: adapters added, the rest quantized."""
    given = weights
    if config.adapter is not None:
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        given = started(weights, config.model, config.adapter, key, read=reading(config.quantization))
    params, frozen = split(given, config.model, config.adapter)
    frozen = quantized(frozen, config.model, config.quantization)
    return params, frozen | ({"teacher": weights} if config.recipe.name == "lrec" else {})


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
