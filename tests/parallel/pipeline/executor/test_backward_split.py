"""A block's backward pass in two parts: the same gradients, no product twice, nothing saved that is free to compute."""

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
from meshwright.models.rope import make_rotations
from meshwright.parallel.pipeline.executor.backward_split import SavedValues, split_backward
from meshwright.parallel.pipeline.executor.slot_pools import on_host, total_bytes

MODEL = ModelConfig(vocab=64, layers=1, embed=16, heads=4, kv_heads=2, mlp=32)
ROWS, LENGTH = 2, 32
SHAPE = (ROWS, LENGTH, MODEL.embed)


class Case:
    """A block under a memory policy, its split, and arrays to run it on."""

    def __init__(self, name, **names):
        graph, state = nnx.split(Block(MODEL, kind=None, rngs=nnx.Rngs(0)))
        chosen = policy.tensor_decisions(MemoryConfig(policy=name, names=names), tensors=policy.emitted_tensors(MODEL))
        remat = policy.make_remat(chosen, scanned=True)

        def block(weights, frozen, context, x):
            ctx = Context(
                positions=context["positions"],
                rotations=make_rotations(MODEL, context["positions"]),
                segment_ids=context["segments"],
                linear=flat_linear,
                attend=functools.partial(attend, BLOCKWISE),
            )
            return remat(lambda weights, x: nnx.merge(graph, weights)(x, ctx)[0])(weights, x)

        self.block, self.weights = block, nnx.to_pure_dict(state)
        positions = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
        self.context = {"positions": positions, "segments": 1 + positions // 20}
        self.x, self.dy = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (1, 2))
        self.split = split_backward(block, self.weights, {}, self.context, self.x)

    @functools.cached_property
    def reference(self):
        _, pull = jax.vjp(lambda weights, x: self.block(weights, {}, self.context, x), self.weights, self.x)
        return pull(self.dy)

    def forward(self):
        y, inputs, weight = self.split.forward(self.weights, {}, self.context, self.x)
        return y, SavedValues(inputs, weight, [])


@pytest.fixture(scope="module", params=["none", "full", "minimal", "attention-out", "offload-block-in"])
def case(request):
    return Case(request.param)


def assert_same(results, expected):
    jax.tree.map(
        lambda result, exact: np.testing.assert_allclose(result, exact, rtol=2e-5, atol=2e-5), results, expected
    )


def test_i_and_w_give_the_gradients_of_the_block_under_every_policy(case):
    _, saved = case.forward()
    dx, stash = case.split.input_gradient(case.weights, {}, case.context, saved, case.dy)
    dw = case.split.weight_gradient(case.weights, {}, case.context, saved._replace(input=[], stash=stash))
    assert_same((dw, dx), case.reference)


def test_a_fused_backward_needs_no_stash(case):
    y, saved = case.forward()
    assert_same(y, case.block(case.weights, {}, case.context, case.x))
    dx, dw = case.split.backward(case.weights, {}, case.context, saved, case.dy)
    assert_same((dw, dx), case.reference)


def test_i_and_w_multiply_no_more_than_a_fused_backward(case):
    _, saved = case.forward()
    parts = case.split

    def flops(function, *inputs):
        return matmul_flops(jax.make_jaxpr(function)(case.weights, {}, case.context, *inputs))

    _, stash = parts.input_gradient(case.weights, {}, case.context, saved, case.dy)
    i_flops = flops(parts.input_gradient, saved, case.dy)
    w_flops = flops(parts.weight_gradient, saved._replace(input=[], stash=stash))
    assert i_flops + w_flops == flops(parts.backward, saved, case.dy)
    assert w_flops == matmul_flops(jax.make_jaxpr(linear_maps)(case.weights, case.x))


def linear_maps(weights, x):
    """The products that W should have: one for each kernel."""
    tokens = x.reshape(-1, MODEL.embed)
    return [tokens.T @ jnp.zeros((len(tokens), leaf.size // MODEL.embed)) for leaf in jax.tree.leaves(weights)
            if leaf.ndim > 1]  # fmt: skip


def test_the_split_saves_what_the_policy_keeps():
    """Under full recomputation F saves its input and nothing else; masks and rotary tables are never saved."""
    full = Case("full").split.shapes
    assert [value.shape for value in full.input + full.weight] == [SHAPE]
    saved = {name: total_bytes([*shapes.input, *shapes.weight]) for name in ("none", "minimal", "attention-out", "full")
            if (shapes := Case(name).split.shapes)}  # fmt: skip
    assert saved["none"] > saved["minimal"] > saved["attention-out"] > saved["full"]


def test_offloading_saves_the_same_values_as_keeping_but_in_host_memory():
    """I and W each fetch what both read: no copy waits on the device."""
    names = ("attn_norm", "q", "mlp_norm")
    kept, offloaded = (Case("full", **dict.fromkeys(names, decision)).split.shapes for decision in ("keep", "offload"))
    for host_list, device_list in zip(offloaded, kept, strict=True):
        assert sorted(value.shape for value in host_list) == sorted(value.shape for value in device_list)
    queries = (ROWS, LENGTH, MODEL.heads, MODEL.head_width)
    hosted = [[value.shape for value in shapes if on_host(value)] for shapes in offloaded]
    assert hosted == [[queries], [SHAPE, SHAPE], []] and not any(on_host(value) for shapes in kept for value in shapes)


def test_frozen_weights_have_no_gradient_and_are_read():
    case = Case("none")

    def block(weights, frozen, context, x):
        return case.block(weights | frozen, {}, context, x)

    frozen = {name: case.weights[name] for name in ("mlp", "mlp_norm")}
    trained = {name: value for name, value in case.weights.items() if name not in frozen}
    parts = split_backward(block, trained, frozen, case.context, case.x)
    _, inputs, weight = parts.forward(trained, frozen, case.context, case.x)
    dx, stash = parts.input_gradient(trained, frozen, case.context, SavedValues(inputs, weight, []), case.dy)
    dw = parts.weight_gradient(trained, frozen, case.context, SavedValues([], weight, stash))
    assert_same((dw, dx), ({name: case.reference[0][name] for name in trained}, case.reference[1]))
