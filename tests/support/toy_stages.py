"""A model small enough to try every schedule on: blocks x + tanh(x w) v, an embedding, a norm, a head. Any dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.memory.policy import rematerialized
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.executor.stage_functions import Parts, Weights
from meshwright.parallel.pipeline.executor.table_executor import pipelined
from meshwright.parallel.pipeline.tables.lowering import rows_of, wired

VOCAB, EMBED, ROWS, LENGTH = 13, 4, 16, 3
PADDED = 16


def block(weights, frozen, given, x):
    context, repeat = given
    x = checkpoint_name(x, "block_in")
    mixed = jnp.tanh(x @ weights["w"] + context["shift"][..., None] + repeat) * frozen["scale"]
    return x + checkpoint_name(mixed, "mixed") @ weights["v"]


def enter(ends, frozen, fields, context, lookup):
    lookup = lookup or (lambda table, tokens: table[tokens])
    return lookup(ends["embed"]["embedding"], fields["tokens"]) + ends["embed"]["bias"]


def normed(ends, frozen, hidden):
    return hidden / jnp.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6) * ends["final_norm"]["scale"]


def kernel(ends, frozen):
    return ends["head"]["kernel"] if "head" in ends else ends["embed"]["embedding"].T


def recipe(logprobs, fields):
    """Not linear in the log-probabilities: what T multiplies with differs from token to token."""
    return (fields["weights"] * (logprobs**2 / 8 - logprobs)).sum(), fields["weights"].sum()


def leave(ends, frozen, hidden, fields, context):
    scores = 3.0 * jnp.tanh(normed(ends, frozen, hidden) @ kernel(ends, frozen) / 3.0)
    scores = jnp.where(jnp.arange(PADDED) < VOCAB, scores, -jnp.inf)
    logprobs = jax.nn.log_softmax(scores)
    numerator, weight = recipe(jnp.take_along_axis(logprobs, fields["targets"][..., None], -1)[..., 0], fields)
    return numerator, (weight, {"squares": (hidden**2).sum()})


PARTS = Parts(
    context=lambda frozen, fields, keys: {"shift": fields["weights"] / 7},
    block=block,
    enter=enter,
    leave=leave,
    normed=normed,
    kernel=kernel,
    recipe=recipe,
    shape=lambda fields: jax.ShapeDtypeStruct((*fields["tokens"].shape, EMBED), fields["weights"].dtype),
    constrain=lambda x, names: x,
    lookup=lambda table, places: table[places],
    vocab=VOCAB,
    softcap=3.0,
)

# What the backward pass reads waits in host memory.
OFFLOADED = dataclasses.replace(
    PARTS, block=rematerialized(dict.fromkeys(("block_in", "mixed"), "offload"), scanned=True)(block)
)


def problem(*, layers, tied):
    """Weights, frozen weights and a batch in float64; `layers` blocks in order."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape) / 2)
    ends = {
        "embed": {"embedding": normal(PADDED, EMBED), "bias": normal(EMBED)},
        "final_norm": {"scale": normal(EMBED)},
    }
    if not tied:
        ends["head"] = {"kernel": normal(EMBED, PADDED)}
    stacked = {"w": normal(layers, EMBED, EMBED), "v": normal(layers, EMBED, EMBED)}
    batch = {
        "tokens": jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH))),
        "targets": jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH))),
        "weights": jnp.asarray(random.integers(0, 3, (ROWS, LENGTH)).astype(np.float64)),
    }
    return Weights(stacked, ends), Weights({"scale": normal(layers, EMBED)}, {}), batch


@jax.jit
def reference(weights, frozen, batch):
    """Loss, weight, gradient and metrics of the whole batch, all blocks one after another."""

    def loss(weights):
        context = PARTS.context({}, batch, None)
        x = enter(weights.ends, {}, batch, context, None)
        for number in range(frozen.stacked["scale"].shape[0]):
            one, other = jax.tree.map(lambda leaf, n=number: leaf[n], (weights.stacked, frozen.stacked))
            x = block(one, other, (context, number), x)
        return leave(weights.ends, {}, x, batch, context)

    (total, (weight, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
    return total, weight, gradient, metrics


def order(table, repeats):
    """The layer at each place of the stacked arrays, -1: none."""
    firsts = np.concatenate([[0], np.cumsum(repeats)])
    return np.array(
        [
            firsts[stage] + number if number < repeats[stage] else -1
            for stage in table.placement.reshape(-1)
            for number in range(max(repeats))
        ]
    )


def engine(table, repeats, weights, frozen, batch, *, mesh, parts=PARTS):
    """(the engine, its arguments, the mesh to run it on)."""
    places = order(table, repeats)
    spread = functools.partial(jax.tree.map, lambda leaf: leaf[np.maximum(places, 0)])
    devices = make_mesh(MeshConfig(platform="cpu", **mesh))
    wiring = wired(table, repeats=repeats)
    made = pipelined(parts, wiring, repeats=max(repeats), mesh=devices, zero=1, dtype=jnp.float64)
    own, fixed = weights._replace(stacked=spread(weights.stacked)), frozen._replace(stacked=spread(frozen.stacked))
    return jax.jit(made), (own, fixed, batch, None, rows_of(wiring)), devices


def run(table, repeats, *given, **how):
    """What the engine makes of it: loss, weight; where it trains, gradients with the layers in order, and metrics.

    Passes over a shared vocabulary have none.
    """
    made, arguments, devices = engine(table, repeats, *given, **how)
    with jax.set_mesh(devices):
        loss, weight, gradient, metrics = jax.device_get(made(*arguments))
    wiring, places = wired(table, repeats=repeats), order(table, repeats)
    if not wiring.trains:
        return loss, weight
    empty = [np.abs(leaf[places < 0]).max(initial=0) for leaf in gradient.stacked.values()]
    np.testing.assert_array_equal(empty, 0)
    back = np.array([int(np.flatnonzero(places == layer)[0]) for layer in range(sum(repeats))])
    gradient = gradient._replace(stacked=jax.tree.map(lambda leaf: leaf[back], gradient.stacked))
    return loss, weight, gradient, *([metrics] if wiring.meetings is None else [])
