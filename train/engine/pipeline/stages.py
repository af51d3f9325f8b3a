"""The model split into pipeline stages for `parallel/pipeline/executor/table_executor.py`, and its gradient engine."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ....configs.errors import UserError
from ....configs.sections.model import ModelConfig
from ....models.context import Context
from ....models.decoder import Decoder, layer_context, run_block
from ....models.rope import make_rotations
from ....parallel.gradients import Batch, Engine, Sums
from ....parallel.pipeline.executor.backward_split import dependents
from ....parallel.pipeline.executor.equations import trace_equations
from ....parallel.pipeline.executor.forward_only_model import hidden_state_reader
from ....parallel.pipeline.executor.replica_routing import draw_shifts
from ....parallel.pipeline.executor.stage_functions import Row, StageFunctions, Weights
from ....parallel.pipeline.executor.table_executor import pipeline_engine
from ....parallel.pipeline.tables.lowering import LoweredTable
from ....parallel.pipeline.tables.table import Table
from ....parallel.sharding import path_name
from ....parallel.state import TrainState, combine
from ....parallel.vocabulary import Constrain, OutputHead, embedding_lookup
from ...objectives import interface as recipes
from ...objectives.distillation import without_teacher
from ...objectives.loss_heads import LossAndMetrics, LossHead

HIDDEN = "teacher_hidden"  # field of a batch: what the teacher's head multiplies
Teacher = Callable[[Any, Batch], OutputHead]  # (its weights, batch) -> what its logits are made of
Lookup = Callable[[jax.Array, jax.Array], jax.Array]


def split_stages(tree: Any) -> Weights:
    """Parameters (or shapes) as the blocks' stacks, by place in the pattern, and the rest."""
    stacks = {place: stack["block"] for place, stack in tree.get("segments", {}).get("0", {}).items()}
    return Weights(stacks, {name: value for name, value in tree.items() if name != "segments"})


def join_stages(weights: Weights) -> Any:
    """The inverse of `cut`."""
    stacks = {place: {"block": block} for place, block in weights.stacked.items()}
    return weights.unstacked | ({"segments": {"0": stacks}} if stacks else {})


def make_stage_functions(
    graph: Any,
    shapes: Any,
    *,
    model: ModelConfig,
    context: Callable[..., Context],
    constrain: Constrain,
    compute: Any,
    recipe: recipes.Loss | None = None,
    ending: LossHead | None = None,
    teacher: ModelConfig | None = None,
) -> StageFunctions:
    """The decoder's pieces as pure functions; `shapes` are those of all its weights, adapters too.

    `context(fields, keys)` is what blocks are told. `ending` makes the loss on the last stage, and `recipe` where the
    vocabulary is cut over `pipe`; a model that only reads has neither. `teacher` has read the batch where it is given.
    """
    places, ahead = len(model.segments[0][0]), nnx.merge(graph, shapes).prefix_length

    def arrays(frozen: Any, fields: Batch, keys: jax.Array | None) -> dict[str, Any]:
        shared = None
        if "adapter" in frozen:  # what the adapters of all layers read is one of the ends
            shared = nnx.merge(graph, shapes | {"adapter": frozen["adapter"]}).adapter()
        fields = fields | {"positions": fields["positions"] + ahead}
        return {
            "fields": fields,
            "keys": keys,
            "rotations": make_rotations(model, fields["positions"]),
            "shared": shared,
        }

    def told(given: dict[str, Any]) -> Context:
        ctx = context(given["fields"], given["keys"])
        return dataclasses.replace(ctx, rotations=given["rotations"], shared_matrices=given["shared"])

    def block(weights: Any, frozen: Any, given: tuple[dict[str, Any], jax.Array], x: jax.Array) -> jax.Array:
        ctx, layers = told(given[0]), given[1] * places
        whole = combine(weights, frozen)
        for place in range(places):
            x, _ = run_block(graphs[place], whole[str(place)], x, layer_context(ctx, layers + place))
        return x

    def decoder(ends: Any, frozen: Any) -> Decoder:
        return nnx.merge(graph, combine(ends, without_teacher(frozen)) | {"segments": shapes["segments"]})

    def enter(ends: Any, frozen: Any, fields: Batch, given: dict[str, Any], rows: Lookup | None) -> jax.Array:
        ctx = told(given) if rows is None else dataclasses.replace(told(given), lookup=rows)
        return decoder(ends, frozen).embed(fields["tokens"], ctx)

    def normed(ends: Any, frozen: Any, hidden: jax.Array) -> jax.Array:
        return decoder(ends, frozen).final_norm(hidden)

    def kernel(ends: Any, frozen: Any) -> jax.Array:
        return decoder(ends, frozen).head_kernel(compute)

    def leave(ends: Any, frozen: Any, hidden: jax.Array, fields: Batch, given: dict[str, Any]) -> LossAndMetrics:
        whole = decoder(ends, frozen)
        said = None if teacher is None else OutputHead(fields[HIDDEN], frozen["teacher"], teacher.logit_softcap)
        return ending(whole, whole.final_norm(hidden), fields, told(given), said)

    def shape(fields: Batch) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*fields["tokens"].shape, model.embed), compute)

    graphs = [nnx.split(nnx.merge(graph, shapes).segments["0"][str(place)].block)[0] for place in range(places)]
    return StageFunctions(
        context=arrays,
        block=block,
        embed=enter,
        loss_head=leave,
        final_norm=normed,
        head_kernel=kernel,
        recipe=recipe,
        hidden_shape=shape,
        constrain=constrain,
        lookup=partial(embedding_lookup, constrain=constrain),
        vocab=model.vocab,
        softcap=model.logit_softcap,
    )


def make_engine(
    parts: StageFunctions, wiring: LoweredTable, *, repeats: int, mesh: Mesh, zero: int, compute: Any, dtype: Any,
    teacher: Teacher | None = None,
) -> Engine:  # fmt: skip
    """The pipelined gradient engine: like the plain one, over parameters in the pipeline's layout.

    The `teacher`, whose weights are in `frozen`, reads the whole batch before the first microbatch enters.

    `rows` are run instead of the table's where they are given (`op_times.py`); `shifts` send microbatches through
    replicas (`parallel/pipeline/executor/replica_routing.py`).
    """
    run = pipeline_engine(parts, wiring, repeats=repeats, mesh=mesh, zero=zero, dtype=dtype)

    def engine(
        params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, rows: Row | None = None, shifts: Any = None
    ) -> Sums:
        weights, fixed = (split_stages(cast_kernels(tree, compute)) for tree in (params, without_teacher(frozen)))
        if teacher is not None:
            head = teacher(cast_kernels(frozen["teacher"], compute), batch)
            batch, fixed = (
                batch | {HIDDEN: head.hidden},
                fixed._replace(unstacked=fixed.unstacked | {"teacher": head.kernel}),
            )
        sums = run(weights, fixed, batch, keys, wiring.fields if rows is None else rows, shifts)
        loss, weight, gradient, metrics = sums
        return Sums(loss, weight, join_stages(gradient) if wiring.trains else (), metrics)

    return engine


def make_teacher(parts: StageFunctions, wiring: LoweredTable, *, repeats: int, mesh: Mesh) -> Teacher:
    """A model in a pipeline of its own, which goes forward only."""
    read = hidden_state_reader(parts, wiring, repeats=repeats, mesh=mesh)

    def teacher(weights: Any, batch: Batch) -> OutputHead:
        own = split_stages(weights)
        return OutputHead(read(own, batch), parts.head_kernel(own.unstacked, {}), parts.softcap)

    return teacher


def routing_inputs(seed: int, table: Table, *, replicas: int) -> Callable[[TrainState], dict[str, jax.Array]]:
    """What the engine is told so that microbatches pass through all replicas: other ways in every update."""

    def told(state: TrainState) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 3), state.step)  # 1: dropout, 2: adapters
        return {"shifts": draw_shifts(key, microbatches=table.microbatches, stages=table.stages, replicas=replicas)}

    return told


def with_batch_weight(engine: Engine, recipe: recipes.Loss) -> Engine:
    """`engine`, its weight counted from the batch, which every stage has, and not where the loss is made.

    Then no stage waits for the last one to divide its gradient. Raises UserError where the recipe's weight depends on
    the log-probabilities.
    """

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, **rows: Row) -> Sums:
        return engine(params, frozen, batch, keys, **rows)._replace(weight=batch_weight(recipe, batch))

    return run


def batch_weight(recipe: recipes.Loss, batch: Batch) -> jax.Array:
    """The recipe's weight of `batch`, without its log-probabilities."""
    names, fields = zip(*batch.items(), strict=True)
    logprobs = jax.ShapeDtypeStruct(batch["targets"].shape, jnp.float32)
    trace = trace_equations(lambda logprobs, *fields: recipe(logprobs, dict(zip(names, fields, strict=True)))[1],
                   logprobs, *(jax.typeof(field) for field in fields))  # fmt: skip
    if trace.outputs[0] in dependents({trace.inputs[0]}, trace.equations):
        raise UserError(
            "pipeline.post_validation: true, but the recipe weighs tokens by their "
            "probability, which only the last stage knows; set it to false"
        )
    return recipe(jnp.zeros(logprobs.shape, logprobs.dtype), batch)[1]


def cast_kernels(tree: Any, compute: Any) -> Any:
    """Kernels in the dtype they are multiplied in: once a step, and half the bytes to gather."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(compute) if path_name(path).endswith("/kernel") else leaf, tree
    )
