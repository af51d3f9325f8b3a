"""A model small enough to run every schedule: blocks x + tanh(x w) v, an embedding, a norm, a head. Any dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.memory.policy import make_remat
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.executor.stage_functions import StageFunctions, Weights
from meshwright.parallel.pipeline.executor.table_executor import pipeline_engine
from meshwright.parallel.pipeline.tables.lowering import lower_table

VOCAB, EMBED, ROWS, LENGTH = 13, 4, 16, 3
PADDED = 16


def block(weights, frozen, context_and_repeat, x):
    context, repeat = context_and_repeat
    x = checkpoint_name(x, "block_in")
    mixed = jnp.tanh(x @ weights["w"] + context["shift"][..., None] + repeat) * frozen["scale"]
    return x + checkpoint_name(mixed, "mixed") @ weights["v"]


def embed(unstacked, frozen, fields, context, lookup):
    lookup = lookup or (lambda table, tokens: table[tokens])
    return lookup(unstacked["embed"]["embedding"], fields["tokens"]) + unstacked["embed"]["bias"]


def final_norm(unstacked, frozen, hidden):
    return hidden / jnp.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6) * unstacked["final_norm"]["scale"]


def head_kernel(unstacked, frozen):
    return unstacked["head"]["kernel"] if "head" in unstacked else unstacked["embed"]["embedding"].T


def recipe(logprobs, fields):
    """Not linear in the log-probabilities, so that the factor in T differs from token to token."""
    return (fields["weights"] * (logprobs**2 / 8 - logprobs)).sum(), fields["weights"].sum()


def loss_head(unstacked, frozen, hidden, fields, context):
    logits = 3.0 * jnp.tanh(final_norm(unstacked, frozen, hidden) @ head_kernel(unstacked, frozen) / 3.0)
    logits = jnp.where(jnp.arange(PADDED) < VOCAB, logits, -jnp.inf)
    logprobs = jax.nn.log_softmax(logits)
    numerator, weight = recipe(jnp.take_along_axis(logprobs, fields["targets"][..., None], -1)[..., 0], fields)
    return numerator, (weight, {"squares": (hidden**2).sum()})


FUNCTIONS = StageFunctions(
    context=lambda frozen, fields, keys: {"shift": fields["weights"] / 7},
    block=block,
    embed=embed,
    loss_head=loss_head,
    final_norm=final_norm,
    head_kernel=head_kernel,
    recipe=recipe,
    hidden_shape=lambda fields: jax.ShapeDtypeStruct((*fields["tokens"].shape, EMBED), fields["weights"].dtype),
    constrain=lambda x, names: x,
    lookup=lambda table, indices: table[indices],
    vocab=VOCAB,
    softcap=3.0,
)

# Offloads what the backward pass reads to host memory.
OFFLOADED = dataclasses.replace(
    FUNCTIONS, block=make_remat(dict.fromkeys(("block_in", "mixed"), "offload"), scanned=True)(block)
)


def problem(*, layers, tied):
    """Weights, frozen weights and a batch in float64; `layers` blocks in order."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape) / 2)
    unstacked = {
        "embed": {"embedding": normal(PADDED, EMBED), "bias": normal(EMBED)},
        "final_norm": {"scale": normal(EMBED)},
    }
    if not tied:
        unstacked["head"] = {"kernel": normal(EMBED, PADDED)}
    stacked = {"w": normal(layers, EMBED, EMBED), "v": normal(layers, EMBED, EMBED)}
    batch = {
        "tokens": jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH))),
        "targets": jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH))),
        "weights": jnp.asarray(random.integers(0, 3, (ROWS, LENGTH)).astype(np.float64)),
    }
    return Weights(stacked, unstacked), Weights({"scale": normal(layers, EMBED)}, {}), batch


@jax.jit
def reference(weights, frozen, batch):
    """Loss, weight, gradient and metrics of the whole batch, all blocks one after another."""

    def loss(weights):
        context = FUNCTIONS.context({}, batch, None)
        x = embed(weights.unstacked, {}, batch, context, None)
        for number in range(frozen.stacked["scale"].shape[0]):
            layer, fixed = jax.tree.map(lambda leaf, n=number: leaf[n], (weights.stacked, frozen.stacked))
            x = block(layer, fixed, (context, number), x)
        return loss_head(weights.unstacked, {}, x, batch, context)

    (total, (weight, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
    return total, weight, gradient, metrics


def layer_order(table, repeats):
    """The layer at each index of the stacked arrays; -1: none."""
    firsts = np.concatenate([[0], np.cumsum(repeats)])
    return np.array(
        [
            firsts[stage] + number if number < repeats[stage] else -1
            for stage in table.placement.reshape(-1)
            for number in range(max(repeats))
        ]
    )


def make_engine(table, repeats, weights, frozen, batch, *, mesh, functions=FUNCTIONS):
    """(jitted engine, its arguments, mesh)."""
    order = layer_order(table, repeats)
    to_run_layout = functools.partial(jax.tree.map, lambda leaf: leaf[np.maximum(order, 0)])
    mesh = make_mesh(MeshConfig(platform="cpu", **mesh))
    lowered = lower_table(table, repeats=repeats)
    engine = pipeline_engine(functions, lowered, repeats=max(repeats), mesh=mesh, zero=1, dtype=jnp.float64)
    weights, frozen = (tree._replace(stacked=to_run_layout(tree.stacked)) for tree in (weights, frozen))
    return jax.jit(engine), (weights, frozen, batch, None, lowered.fields), mesh


def run(table, repeats, *inputs, **options):
    """Loss and weight that the engine computes; if it trains, also gradients with the layers in order, and metrics.

    With vocabulary passes there are no metrics.
    """
    engine, arguments, mesh = make_engine(table, repeats, *inputs, **options)
    with jax.set_mesh(mesh):
        loss, weight, gradient, metrics = jax.device_get(engine(*arguments))
    lowered, order = lower_table(table, repeats=repeats), layer_order(table, repeats)
    if not lowered.trains:
        return loss, weight
    padding = [np.abs(leaf[order < 0]).max(initial=0) for leaf in gradient.stacked.values()]
    np.testing.assert_array_equal(padding, 0)
    index = np.array([int(np.flatnonzero(order == layer)[0]) for layer in range(sum(repeats))])
    gradient = gradient._replace(stacked=jax.tree.map(lambda leaf: leaf[index], gradient.stacked))
    return loss, weight, gradient, *([metrics] if lowered.vocab_exchanges is None else [])
