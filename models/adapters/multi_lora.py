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
from .adapted_modules import sites
from .interface import Inside, Leaves
from .lora import LORA


def gathered(x: jax.Array, weights: jax.Array, own: jax.Array, *, inputs: int) -> jax.Array:
    """x [batch, sequence, inputs...] times `weights` [adapters, inputs..., outputs...], each row its `own` [batch].

    The thin matrices are fetched for every row, and rows multiplied by them as a batch: no more FLOPs than for one
    adapter, whatever order rows stand in and wherever a mesh cuts them. A row reads nothing of other adapters.
    """
    batch, sequence = x.shape[:2]
    thin = jnp.take(weights, own, axis=0).reshape(batch, math.prod(x.shape[2:]), -1)
    return (x.reshape(batch, sequence, -1) @ thin).reshape(batch, sequence, *weights.shape[1 + inputs :])


def ragged(x: jax.Array, weights: jax.Array, own: jax.Array, *, inputs: int) -> jax.Array:
    """The same for rows in the order of their adapters (`own` is sorted), as a grouped product of tokens.

    On a CPU `jax.lax.ragged_dot` is a product with every adapter's matrix, tokens of others being zeros: adapters times
    the FLOPs and the memory. Not a number times zero is not a number: there an adapter that went wrong spoils all.
    """
    batch, sequence = x.shape[:2]
    count = weights.shape[0]
    sizes = sequence * jnp.sum(own == jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)
    flat = x.reshape(batch * sequence, -1)
    y = jax.lax.ragged_dot(flat, weights.reshape(count, flat.shape[1], -1), sizes)
    return y.reshape(batch, sequence, *weights.shape[1 + inputs :])


PRODUCTS = {"gathered": gathered, "ragged": ragged}  # by `adapter.product`


def lora(leaves: Leaves, x: jax.Array, inside: Inside, ctx: Context) -> jax.Array:
    """The adapted map of x [batch, sequence, inputs...]; leaves have a leading [adapters]."""
    a, b, scale = (leaves[name].astype(ctx.compute) for name in ("a", "b", "scale"))
    narrow = ctx.product(inside.dropped(x, ctx), a, ctx.adapters, inputs=inside.inputs)
    added = ctx.product(narrow * jnp.take(scale, ctx.adapters, axis=0)[:, None], b, ctx.adapters, inputs=1)
    return inside.biased(inside.product(x, ctx) + added)


OF_ROWS = dataclasses.replace(LORA, apply=lora)


def attached(model: ModelConfig, adapters: Mapping[str, AdapterConfig]) -> Callable[[Decoder], None]:
    """A function that puts all adapters, leaves of zeros, into a decoder. Raises as `sites`, naming the adapter."""
    for name, adapter in adapters.items():
        try:
            sites(model, adapter)
        except UserError as error:
            raise UserError(f"adapters.{name}: {error}") from None
    wide = widest(adapters)

    def put(decoder: Decoder) -> None:
        for site in sites(model, wide):
            linear = attach.linear_at(decoder, site)
            leaves = shapes(site, wide, linear.kernel[...])
            zeros = {name: jnp.zeros((one.shape[0], len(adapters), *one.shape[1:])) for name, one in leaves.items()}
            linear.adapter = attach.beside(site, OF_ROWS, zeros, rate=wide.dropout)

    return put


def shapes(site: Any, adapter: AdapterConfig, kernels: Any) -> Leaves:
    """Of the leaves of one adapter beside a stack of kernels."""
    return jax.eval_shape(partial(attach.start_site, site, adapter), kernels, jax.random.key(0))[1]


def started(weights: Params, model: ModelConfig, adapters: Mapping[str, AdapterConfig], key: jax.Array) -> Params:
    """`weights` with all adapters' leaves, each as in a run of its own before the first step. Pure, to be traced."""
    alone = [attach.started(weights, model, adapter, key) for adapter in adapters.values()]
    result, wide = attach.copied(weights), widest(adapters)
    for site in sites(model, wide):
        linear = attach.at(result, site.path)
        each = [attach.at(tree, site.path).get("adapter", {}) for tree in alone]
        linear["adapter"] = {
            name: jnp.stack([filled(one.get(name), like) for one in each], axis=1)
            for name, like in shapes(site, wide, linear["kernel"]).items()
        }
    return result


def filled(leaf: jax.Array | None, like: Any) -> jax.Array:
    """`leaf`, no larger than `like`, filled up with zeros; None: all zeros."""
    zeros = jnp.zeros(like.shape, like.dtype)
    return zeros if leaf is None else zeros.at[tuple(map(slice, leaf.shape))].set(leaf)


def split(tree: Params, model: ModelConfig, adapters: Mapping[str, AdapterConfig]) -> tuple[Params, Params]:
    """(what learns, [adapters, layers, ...]; all the rest, as `started` has it)."""
    params, frozen = attach.split(tree, model, widest(adapters))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), params), frozen


def read(params: Params) -> Params:
    """What learns, as the decoder reads it: [layers, adapters, ...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), params)


def one_of(leaf: jax.Array, like: Any, *, number: int, axis: int) -> jax.Array:
    """Adapter `number`'s part of a leaf that has adapters along `axis`, without what only wider ones use."""
    return jnp.take(leaf, number, axis=axis)[tuple(map(slice, like.shape))]
