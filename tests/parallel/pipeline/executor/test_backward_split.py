"""A block's backward pass in two halves: the same gradients, no product twice, nothing kept that is free to make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshwright.configs.sections.model import ModelConfig
from meshwright.configs.sections.parallel import MemoryConfig
from meshwright.memory import policy
from meshwright.memory.jaxpr_stats import matmul_flops
from meshwright.models.attention.blockwise import BLOCKWISE
from meshwright.models.attention.interface import attend
from meshwright.models.block import Block
from meshwright.models.context import Context, flat_linear
from meshwright.models.rope import rotations
from meshwright.parallel.pipeline.executor.backward_split import Saved, split
from meshwright.parallel.pipeline.executor.slot_pools import on_host, size

MODEL = ModelConfig(vocab=64, layers=1, embed=16, heads=4, kv_heads=2, mlp=32)
ROWS, LENGTH = 2, 32
SHAPE = (ROWS, LENGTH, MODEL.embed)


class Case:
    """A block under a memory policy, split; and arrays to try it on."""

    def __init__(self, name, **names):
        graph, state = nnx.split(Block(MODEL, kind=None, rngs=nnx.Rngs(0)))
        chosen = policy.decisions(MemoryConfig(policy=name, names=names), tensors=policy.emitted(MODEL))
        remat = policy.rematerialized(chosen, scanned=True)

        def block(weights, frozen, context, x):
            ctx = Context(
                positions=context["positions"],
                rotations=rotations(MODEL, context["positions"]),
                segment_ids=context["segments"],
                linear=flat_linear,
                attend=functools.partial(attend, BLOCKWISE),
            )
            return remat(lambda weights, x: nnx.merge(graph, weights)(x, ctx)[0])(weights, x)

        self.block, self.weights = block, nnx.to_pure_dict(state)
        place = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
        self.context = {"positions": place, "segments": 1 + place // 20}
        self.x, self.dy = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (1, 2))
        self.split = split(block, self.weights, {}, self.context, self.x)

    @functools.cached_property
    def reference(self):
        _, pull = jax.vjp(lambda weights, x: self.block(weights, {}, self.context, x), self.weights, self.x)
        return pull(self.dy)

    def forward(self):
        y, inputs, weight = self.split.forward(self.weights, {}, self.context, self.x)
        return y, Saved(inputs, weight, [])


@pytest.fixture(scope="module", params=["none", "full", "minimal", "attention-out", "offload-block-in"])
def case(request):
    return Case(request.param)


def same(found, expected):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5), found, expected)


def test_the_halves_are_the_whole_under_every_policy(case):
    _, saved = case.forward()
    dx, stash = case.split.input_gradient(case.weights, {}, case.context, saved, case.dy)
    dw = case.split.weight_gradient(case.weights, {}, case.context, saved._replace(input=[], stash=stash))
    same((dw, dx), case.reference)


def test_a_fused_backward_needs_no_stash(case):
    y, saved = case.forward()
    same(y, case.block(case.weights, {}, case.context, case.x))
    dx, dw = case.split.backward(case.weights, {}, case.context, saved, case.dy)
    same((dw, dx), case.reference)


def test_together_the_halves_multiply_no_more_than_the_whole(case):
    _, saved = case.forward()
    parts = case.split

    def flops(function, *given):
        return matmul_flops(jax.make_jaxpr(function)(case.weights, {}, case.context, *given))

    _, stash = parts.input_gradient(case.weights, {}, case.context, saved, case.dy)
    first = flops(parts.input_gradient, saved, case.dy)
    second = flops(parts.weight_gradient, saved._replace(input=[], stash=stash))
    assert first + second == flops(parts.backward, saved, case.dy)
    assert second == matmul_flops(jax.make_jaxpr(linear_maps)(case.weights, case.x))


def linear_maps(weights, x):
    """As many FLOPs as W should have: one product for each kernel."""
    tokens = x.reshape(-1, MODEL.embed)
    return [tokens.T @ jnp.zeros((len(tokens), leaf.size // MODEL.embed)) for leaf in jax.tree.leaves(weights)
            if leaf.ndim > 1]  # fmt: skip


def test_what_is_saved_is_what_the_policy_keeps():
    """Under full recomputation F saves its input and nothing else; masks and turns of positions are never saved."""
    full = Case("full").split.shapes
    assert [one.shape for one in full.input + full.weight] == [SHAPE]
    kept = {name: size([*shapes.input, *shapes.weight]) for name in ("none", "minimal", "attention-out", "full")
            if (shapes := Case(name).split.shapes)}  # fmt: skip
    assert kept["none"] > kept["minimal"] > kept["attention-out"] > kept["full"]


def test_what_is_offloaded_is_what_would_be_kept_but_in_host_memory():
    """I and W each fetch what both read: no copy waits on the device."""
    names = ("attn_norm", "q", "mlp_norm")
    kept, moved = (Case("full", **dict.fromkeys(names, decision)).split.shapes for decision in ("keep", "offload"))
    for there, here in zip(moved, kept, strict=True):
        assert sorted(one.shape for one in there) == sorted(one.shape for one in here)
    queries = (ROWS, LENGTH, MODEL.heads, MODEL.head_width)
    hosted = [[one.shape for one in shapes if on_host(one)] for shapes in moved]
    assert hosted == [[queries], [SHAPE, SHAPE], []] and not any(on_host(one) for shapes in kept for one in shapes)


def test_frozen_weights_have_no_gradient_and_are_read():
    case = Case("none")

    def block(weights, frozen, context, x):
        return case.block(weights | frozen, {}, context, x)

    frozen = {name: case.weights[name] for name in ("mlp", "mlp_norm")}
    trained = {name: value for name, value in case.weights.items() if name not in frozen}
    parts = split(block, trained, frozen, case.context, case.x)
    _, inputs, weight = parts.forward(trained, frozen, case.context, case.x)
    dx, stash = parts.input_gradient(trained, frozen, case.context, Saved(inputs, weight, []), case.dy)
    dw = parts.weight_gradient(trained, frozen, case.context, Saved([], weight, stash))
    same((dw, dx), ({name: case.reference[0][name] for name in trained}, case.reference[1]))
