"""Several LoRAs beside one kernel: every row of a batch has one of its own, and the kernel is multiplied once for all.

    y[row] = x[row] W + ((x[row] A[own]) * scale[own]) B[own] + bias        own = ctx.adapters[row]

A stack's leaves are [layers, adapters, ...] beside the frozen kernel. What is trained is [adapters, layers, ...] in the
state, so that whatever one adapter's run does to its leaves, a `vmap` does to everybody's. Ranks may differ: a narrower
adapter is filled up with zeros, which its scale of zero keeps out of the product and of the gradient, exactly; so is
one that adapts fewer maps. Two ways to multiply rows by their own matrices, `gathered` and `ragged`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...configs.adapter_runs import widest
from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..decoder import Decoder, Params
from . import attach
from .adapted_modules import find_adapted_modules
from .interface import BaseLinear, Leaves
from .lora import LORA


def gathered_product(x: jax.Array, weights: jax.Array, adapter_ids: jax.Array, *, inputs: int) -> jax.Array:
    """x [batch, sequence, inputs...] times `weights` [adapters, inputs..., outputs...], each row its `own` [batch].

    The thin matrices are fetched for every row, and rows multiplied by them as a batch: no more FLOPs than for one
    adapter, whatever order rows stand in and wherever a mesh cuts them. A row reads nothing of other adapters.
    """
    batch, sequence = x.shape[:2]
    thin = jnp.take(weights, adapter_ids, axis=0).reshape(batch, math.prod(x.shape[2:]), -1)
    return (x.reshape(batch, sequence, -1) @ thin).reshape(batch, sequence, *weights.shape[1 + inputs :])


def ragged_product(x: jax.Array, weights: jax.Array, adapter_ids: jax.Array, *, inputs: int) -> jax.Array:
    """The same for rows in the order of their adapters (`own` is sorted), as a grouped product of tokens.

    On a CPU `jax.lax.ragged_dot` is a product with every adapter's matrix, tokens of others being zeros: adapters times
    the FLOPs and the memory. Not a number times zero is not a number: there an adapter that went wrong spoils all.
    """
    batch, sequence = x.shape[:2]
    count = weights.shape[0]
    sizes = sequence * jnp.sum(adapter_ids == jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)
    flat = x.reshape(batch * sequence, -1)
    y = jax.lax.ragged_dot(flat, weights.reshape(count, flat.shape[1], -1), sizes)
    return y.reshape(batch, sequence, *weights.shape[1 + inputs :])


PRODUCTS = {"gathered": gathered_product, "ragged": ragged_product}  # by `adapter.product`


def apply(leaves: Leaves, x: jax.Array, base: BaseLinear, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]; leaves have a leading [adapters]."""
    a, b, scale = (leaves[name].astype(ctx.compute_dtype) for name in ("a", "b", "scale"))
    narrow = ctx.adapter_product(base.dropout(x, ctx), a, ctx.adapter_ids, inputs=base.inputs)
    added = ctx.adapter_product(
        narrow * jnp.take(scale, ctx.adapter_ids, axis=0)[:, None], b, ctx.adapter_ids, inputs=1
    )
    return base.add_bias(base.multiply(x, ctx) + added)


MULTI_LORA = dataclasses.replace(LORA, apply=apply)


def adapter_inserter(model: ModelConfig, adapters: Mapping[str, AdapterConfig]) -> Callable[[Decoder], None]:
    """A function that puts all adapters, leaves of zeros, into a decoder. Raises as `sites`, naming the adapter."""
    for name, adapter in adapters.items():
        try:
            find_adapted_modules(model, adapter)
        except UserError as error:
            raise UserError(f"adapters.{name}: {error}") from None
    wide = widest(adapters)

    def put(decoder: Decoder) -> None:
        for site in find_adapted_modules(model, wide):
            linear = attach.get_linear(decoder, site)
            leaves = leaf_shapes(site, wide, linear.kernel[...])
            zeros = {name: jnp.zeros((one.shape[0], len(adapters), *one.shape[1:])) for name, one in leaves.items()}
            linear.adapter = attach.make_adapter(site, MULTI_LORA, zeros, rate=wide.dropout)

    return put


def leaf_shapes(site: Any, adapter: AdapterConfig, kernels: Any) -> Leaves:
    """Of the leaves of one adapter beside a stack of kernels."""
    return jax.eval_shape(partial(attach.init_adapter, site, adapter), kernels, jax.random.key(0))[1]


def init_adapters(weights: Params, model: ModelConfig, adapters: Mapping[str, AdapterConfig], key: jax.Array) -> Params:
    """`weights` with all adapters' leaves, each as in a run of its own before the first step. Pure, to be traced."""
    alone = [attach.init_adapters(weights, model, adapter, key) for adapter in adapters.values()]
    result, wide = attach.copy_dicts(weights), widest(adapters)
    for site in find_adapted_modules(model, wide):
        linear = attach.subtree(result, site.path)
        each = [attach.subtree(tree, site.path).get("adapter", {}) for tree in alone]
        linear["adapter"] = {
            name: jnp.stack([pad_with_zeros(one.get(name), like) for one in each], axis=1)
            for name, like in leaf_shapes(site, wide, linear["kernel"]).items()
        }
    return result


def pad_with_zeros(leaf: jax.Array | None, like: Any) -> jax.Array:
    """`leaf`, no larger than `like`, filled up with zeros; None: all zeros."""
    zeros = jnp.zeros(like.shape, like.dtype)
    return zeros if leaf is None else zeros.at[tuple(map(slice, leaf.shape))].set(leaf)


def split_trained(tree: Params, model: ModelConfig, adapters: Mapping[str, AdapterConfig]) -> tuple[Params, Params]:
    """(what learns, [adapters, layers, ...]; all the rest, as `started` has it)."""
    params, frozen = attach.split_trained(tree, model, widest(adapters))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), params), frozen


def to_decoder_order(params: Params) -> Params:
    """What learns, as the decoder reads it: [layers, adapters, ...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), params)


def slice_adapter(leaf: jax.Array, like: Any, *, adapter_id: int, axis: int) -> jax.Array:
    """Adapter `number`'s part of a leaf that has adapters along `axis`, without what only wider ones use."""
    return jnp.take(leaf, adapter_id, axis=axis)[tuple(map(slice, like.shape))]
