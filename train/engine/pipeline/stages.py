"""The model as pipeline stages for `parallel/pipeline/executor/table_executor.py`, with its gradient engine."""

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
from ....parallel.sharding import map_with_path
from ....parallel.state import TrainState, combine
from ....parallel.vocabulary import Constrain, OutputHead, embedding_lookup
from ...objectives.distillation import without_teacher
from ...objectives.interface import RecipeLoss
from ...objectives.loss_heads import LossHead, LossSums, MakeContext

TEACHER_HIDDEN = "teacher_hidden"  # field of a batch: the hidden states that the teacher's head multiplies
Teacher = Callable[[Any, Batch], OutputHead]  # (teacher's weights, batch) -> inputs of the teacher's logits
Lookup = Callable[[jax.Array, jax.Array], jax.Array]


def split_stacked(tree: Any) -> Weights:
    """Split parameters (or shapes) into the stacks of blocks, by place in the layer pattern, and all others."""
    stacks = {place: stack["block"] for place, stack in tree.get("segments", {}).get("0", {}).items()}
    return Weights(stacks, {name: value for name, value in tree.items() if name != "segments"})


def merge_stacked(weights: Weights) -> Any:
    """The inverse of `split_stacked`."""
    stacks = {place: {"block": block} for place, block in weights.stacked.items()}
    return weights.unstacked | ({"segments": {"0": stacks}} if stacks else {})


def make_stage_functions(
    graph: Any,
    shapes: Any,
    *,
    model: ModelConfig,
    context: MakeContext,
    constrain: Constrain,
    compute: Any,
    recipe: RecipeLoss | None = None,
    loss_head: LossHead | None = None,
    teacher: ModelConfig | None = None,
) -> StageFunctions:
    """The decoder as pure functions of a stage; `shapes` are those of all its weights, adapters included.

    `context(fields, keys)` makes the context of blocks. `loss_head` makes the loss on the last stage, `recipe` makes it
    if the vocabulary is split over `pipe`; a model that only reads has neither. With a `teacher`, the batch holds the
    teacher's hidden states.
    """
    full_model = nnx.merge(graph, shapes)
    pattern_length = len(model.segments[0][0])
    block_graphs = [nnx.split(full_model.segments["0"][str(place)].block)[0] for place in range(pattern_length)]

    def context_arrays(frozen: Any, fields: Batch, keys: jax.Array | None) -> dict[str, Any]:
        shared = None
        if "adapter" in frozen:  # matrices that the adapters of all layers share are not stacked
            shared = nnx.merge(graph, shapes | {"adapter": frozen["adapter"]}).adapter()
        fields = fields | {"positions": fields["positions"] + full_model.prefix_length}
        rotations = make_rotations(model, fields["positions"])
        return {"fields": fields, "keys": keys, "rotations": rotations, "shared": shared}

    def make_context(arrays: dict[str, Any]) -> Context:
        ctx = context(arrays["fields"], arrays["keys"])
        return dataclasses.replace(ctx, rotations=arrays["rotations"], shared_matrices=arrays["shared"])

    def block(weights: Any, frozen: Any, inputs: tuple[dict[str, Any], jax.Array], x: jax.Array) -> jax.Array:
        arrays, repeat = inputs
        ctx, params = make_context(arrays), combine(weights, frozen)
        for place, block_graph in enumerate(block_graphs):
            x, _ = run_block(block_graph, params[str(place)], x, layer_context(ctx, repeat * pattern_length + place))
        return x

    def decoder(unstacked: Any, frozen: Any) -> Decoder:
        return nnx.merge(graph, combine(unstacked, without_teacher(frozen)) | {"segments": shapes["segments"]})

    def embed(unstacked: Any, frozen: Any, fields: Batch, arrays: dict[str, Any], lookup: Lookup | None) -> jax.Array:
        ctx = make_context(arrays)
        if lookup is not None:
            ctx = dataclasses.replace(ctx, lookup=lookup)
        return decoder(unstacked, frozen).embed(fields["tokens"], ctx)

    def apply_loss_head(
        unstacked: Any, frozen: Any, hidden: jax.Array, fields: Batch, arrays: dict[str, Any]
    ) -> LossSums:
        student, output_head = decoder(unstacked, frozen), None
        if teacher is not None:
            output_head = OutputHead(fields[TEACHER_HIDDEN], frozen["teacher"], teacher.logit_softcap)
        return loss_head(student, student.final_norm(hidden), fields, make_context(arrays), output_head)

    return StageFunctions(
        context=context_arrays,
        block=block,
        embed=embed,
        loss_head=apply_loss_head,
        final_norm=lambda unstacked, frozen, hidden: decoder(unstacked, frozen).final_norm(hidden),
        head_kernel=lambda unstacked, frozen: decoder(unstacked, frozen).head_kernel(compute),
        recipe=recipe,
        hidden_shape=lambda fields: jax.ShapeDtypeStruct((*fields["tokens"].shape, model.embed), compute),
        constrain=constrain,
        lookup=partial(embedding_lookup, constrain=constrain),
        vocab=model.vocab,
        softcap=model.logit_softcap,
    )


def make_engine(
    functions: StageFunctions, lowered: LoweredTable, *, repeats: int, mesh: Mesh, zero: int, compute: Any, dtype: Any,
    teacher: Teacher | None = None,
) -> Engine:  # fmt: skip
    """The pipelined gradient engine, like the plain one, over parameters in run order.

    The `teacher`, whose weights are in `frozen`, reads the whole batch before the first microbatch enters. If `rows`
    are given, they run instead of the table's (`op_profiler.py`). `shifts` route microbatches through replicas
    (`parallel/pipeline/executor/replica_routing.py`).
    """
    run = pipeline_engine(functions, lowered, repeats=repeats, mesh=mesh, zero=zero, dtype=dtype)

    def engine(
        params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, rows: Row | None = None, shifts: Any = None
    ) -> Sums:
        trained = split_stacked(cast_kernels(params, compute))
        constant = split_stacked(cast_kernels(without_teacher(frozen), compute))
        if teacher is not None:
            head = teacher(cast_kernels(frozen["teacher"], compute), batch)
            batch = batch | {TEACHER_HIDDEN: head.hidden}
            constant = constant._replace(unstacked=constant.unstacked | {"teacher": head.kernel})
        rows = lowered.fields if rows is None else rows
        loss, weight, gradient, metrics = run(trained, constant, batch, keys, rows, shifts)
        return Sums(loss, weight, merge_stacked(gradient) if lowered.trains else (), metrics)

    return engine


def make_teacher(functions: StageFunctions, lowered: LoweredTable, *, repeats: int, mesh: Mesh) -> Teacher:
    """A teacher in a forward-only pipeline of its own."""
    read_hidden = hidden_state_reader(functions, lowered, repeats=repeats, mesh=mesh)

    def teacher(weights: Any, batch: Batch) -> OutputHead:
        split = split_stacked(weights)
        return OutputHead(read_hidden(split, batch), functions.head_kernel(split.unstacked, {}), functions.softcap)

    return teacher


def routing_inputs(seed: int, table: Table, *, replicas: int) -> Callable[[TrainState], dict[str, jax.Array]]:
    """Extra engine inputs that route microbatches through all replicas, on a new random route in every step."""

    def extra_inputs(state: TrainState) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 3), state.step)  # 1: dropout, 2: adapters
        return {"shifts": draw_shifts(key, microbatches=table.microbatches, stages=table.stages, replicas=replicas)}

    return extra_inputs


def with_batch_weight(engine: Engine, recipe: RecipeLoss) -> Engine:
    """`engine` whose weight is counted from the batch, which every stage has, and not on the last stage.

    So no stage waits for the last one before it divides its gradient. Raises UserError if the recipe's weight depends
    on the log-probabilities.
    """

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, **rows: Row) -> Sums:
        return engine(params, frozen, batch, keys, **rows)._replace(weight=batch_weight(recipe, batch))

    return run


def batch_weight(recipe: RecipeLoss, batch: Batch) -> jax.Array:
    """The recipe's weight of `batch`, computed without log-probabilities. Raises UserError if it depends on them."""
    names, fields = zip(*batch.items(), strict=True)
    logprobs = jax.ShapeDtypeStruct(batch["targets"].shape, jnp.float32)
    trace = trace_equations(lambda logprobs, *fields: recipe(logprobs, dict(zip(names, fields, strict=True)))[1],
                   logprobs, *(jax.typeof(field) for field in fields))  # fmt: skip
    if trace.outputs[0] in dependents({trace.inputs[0]}, trace.equations):
        raise UserError(
            "pipeline.post_validation: true, but the recipe weights tokens by their probability, which only the last "
            "stage knows; set pipeline.post_validation to false"
        )
    return recipe(jnp.zeros(logprobs.shape, logprobs.dtype), batch)[1]


def cast_kernels(tree: Any, compute: Any) -> Any:
    """Cast kernels to `compute`, once a step and not at each use; it also halves the bytes to gather."""
    return map_with_path(lambda path, leaf: leaf.astype(compute) if path.endswith("/kernel") else leaf, tree)
