"""One block under a memory policy, and the tensors that its backward pass reads."""

import contextlib
import functools
import io
import re

import jax
import jax.numpy as jnp
from flax import nnx
from support.equivalence import tiny

from meshwright.configs.sections.model import ModelConfig
from meshwright.memory import jaxpr_stats, policy
from meshwright.models.block import Block
from meshwright.models.context import Context
from meshwright.models.decoder import run_block

POST_NORMS = {"post_norms": True}  # so that the backward pass reads every named tensor, the last one too


@functools.lru_cache
def make_block(model_json):
    """(structure, shapes of the weights) of one block."""
    model = ModelConfig.model_validate_json(model_json)
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(model, kind=None, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def make_loss(model, memory):
    """(loss, shapes of its arguments) of one block of `model` under `memory`."""
    graph, shapes = make_block(model.model_dump_json())
    decisions = policy.tensor_decisions(memory, tensors=policy.emitted_tensors(model))
    x = jax.ShapeDtypeStruct((2, 8, model.embed), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))

    def loss(weights, x):
        ctx = Context(positions=positions, remat=policy.make_remat(decisions, scanned=False))
        return run_block(graph, weights, x, ctx)[0].sum()

    return loss, (shapes, x)


def backward(memory, **model):
    """The jaxpr of the gradient."""
    config = tiny(memory=memory, model=model)
    loss, shapes = make_loss(config.model, config.memory)
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes)


def residuals(memory, **model):
    """(names kept on the device, number of arrays offloaded to the host) for the backward pass."""
    config = tiny(memory=memory, model=model)
    loss, shapes = make_loss(config.model, config.memory)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        jax.ad_checkpoint.print_saved_residuals(loss, *shapes)
    text = printed.getvalue()
    return set(re.findall(r"named '(\w+)'", text)), text.count("<host>")


def flops(memory, **model):
    """Matrix-product FLOPs of forward and backward pass together."""
    return jaxpr_stats.matmul_flops(backward(memory, **model))
