"""An update that begins before the gradient's norm is known is, once validated, the one that waits for it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.equivalence import assert_same, tiny, trajectory

from meshwright.configs.errors import UserError
from meshwright.configs.sections.training import OptimizerConfig
from meshwright.parallel.hlo.collectives import KINDS, varying_axes
from meshwright.parallel.hlo.text import parse_module
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.state import TrainState
from meshwright.train.engine.pipeline.stages import batch_weight
from meshwright.train.engine.program import build
from meshwright.train.objectives.next_token import next_token
from meshwright.train.optim.gradient_clipping import no_clipping
from meshwright.train.optim.optimizer_chain import RULES, build_optimizer
from meshwright.train.optim.optimizer_update import post_validated, skip_nonfinite_or_spiking

SHAPES = {"segments": {"0": {"0": {"block": {"mlp": {"up": {"kernel": (2, 8, 4)}}}}}}, "head": {"kernel": (8, 4)}}
SIZES = {"below the limit": 0.01, "above it": 3.0, "infinite": float("inf"), "no number": float("nan")}


def random_tree(scale):
    """A tree of random arrays."""
    random = np.random.default_rng(0)
    leaf = lambda shape: jnp.asarray(random.normal(size=shape) * scale, jnp.float32)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", SIZES)
def test_a_dropped_optimistic_update_leaves_no_trace(name, size):
    """Bit for bit, from a state that has moved, for every optimizer there is."""
    section = OptimizerConfig(name=name, clip=1.0, weight_decay=0.1, ema=0.9)
    optimizer, optimistic = (
        build_optimizer(section, steps=9, spike=50.0, **clip) for clip in ({}, {"clip": no_clipping})
    )
    state = TrainState(jnp.int32(0), random_tree(1.0), {}, optimizer.init(random_tree(1.0)), (), jnp.zeros(2))
    results = []
    for update in map(jax.jit, (skip_nonfinite_or_spiking(optimizer), post_validated(optimizer, optimistic, clip=1.0))):
        first = update(random_tree(0.02), state, jnp.float32(0.1), jnp.bool_(True))
        moved = TrainState(jnp.int32(1), first.params, {}, first.opt_state, (), jnp.zeros(2))
        gradient = random_tree(SIZES[size])
        norm = optax.global_norm(gradient)
        results.append(update(gradient, moved, norm, jnp.isfinite(norm)))
    expected, found = results
    for one, other in zip(jax.tree.leaves(expected[:2]), jax.tree.leaves(found[:2]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(found.metrics["rolled_back"]) == (size != "below the limit")


def staged(**changes):
    """A pipeline that validates after the fact; its gradients are clipped in some steps and not in others."""
    base = {"mesh": {"pipe": 2, "fsdp": 2}, "microbatches": 4, "model": {"layers": 4}}
    return tiny(**base, optimizer={"name": "sgd", "clip": 14.0}, pipeline={"schedule": "zb-h1", **changes})


def test_post_validation_trains_like_waiting_for_the_norm():
    late = staged(post_validation=True)
    assert_same(staged(), late, tolerance=1e-6)
    rolled_back = [metrics["rolled_back"] for metrics in trajectory(late)[0]]
    clipped = [metrics["grad_norm"] >= 14.0 for metrics in trajectory(late)[0]]
    assert rolled_back == clipped and {0.0, 1.0} == set(rolled_back)


def test_with_post_validation_no_stage_waits_before_its_update():
    """In the compiled program: what the branch is given of the blocks was made without a message between stages.

    Of each kernel these are the gradient and, moved already, parameter and momentum. (The compiler may put a small
    gradient's sum over `fsdp` together with one that waits.)
    """
    program = build(staged(post_validation=True), make_mesh(staged().mesh))
    instructions = entry(program.compiled_step().as_text())
    read = {one.name: re.findall(r"%([\w.\-]+)", one.text.split(" = ", 1)[1]) for one in instructions}
    ticks, waits = set(), set()  # made of what the loop over ticks made; and of what stages told each other after it
    for one in instructions:
        sources = set(read[one.name])
        across = one.opcode in KINDS and "pipe" in varying_axes(one.text, program.mesh)
        if one.opcode == "while" or sources & ticks:
            ticks.add(one.name)
        if sources & waits or (across and sources & ticks):
            waits.add(one.name)
    (branch,) = (one for one in instructions if one.opcode == "conditional")
    given = {name for operand in read[branch.name] for name in read.get(operand, ())}
    early = {name for name in given if name in ticks and name not in waits}
    kernels = [leaf for leaf in jax.tree.leaves(program.shapes.params["segments"]) if leaf.ndim > 2]
    assert len(early) >= 3 * len(kernels) == 21


def entry(text):
    """The instructions of the outermost computation of a module."""
    module = parse_module(text)
    return module.computations[module.entry].instructions


def test_a_recipe_weighted_by_probability_refuses_post_validation():
    def hard(logprobs, batch):
        return logprobs.sum(), jnp.where(logprobs < -1, batch["loss_weights"], 0).sum()

    batch = {"targets": jnp.zeros((2, 4), jnp.int32), "loss_weights": jnp.ones((2, 4))}
    assert float(batch_weight(next_token, batch)) == 8
    with pytest.raises(UserError, match=r"pipeline\.post_validation: true"):
        batch_weight(hard, batch)
