"""Several LoRAs beside one kernel: each row of a batch uses one of them, and the kernel is multiplied once for all.

    y[row] = x[row] W + ((x[row] A[id]) * scale[id]) B[id] + bias        id = ctx.adapter_ids[row]

Beside the frozen kernel a stack's leaves are [layers, adapters, ...]. In the state the trained ones are [adapters,
layers, ...], so that `vmap` does for all adapters what the run of one does to its leaves. Ranks may differ: a narrower
adapter is padded with zeros, which its scale of zero keeps out of the product and of the gradient, exactly; so is an
adapter with fewer targets. Two products multiply rows by their own matrices: `gathered_product` and `ragged_product`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...configs.adapter_runs import widest_adapter
from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..decoder import Decoder, Params
from . import attach
from .adapted_modules import AdaptedModule, find_adapted_modules
from .interface import BaseLinear, Leaves
from .lora import LORA


def gathered_product(x: jax.Array, weights: jax.Array, adapter_ids: jax.Array, *, inputs: int) -> jax.Array:
    """x [batch, sequence, inputs...] times `weights` [adapters, inputs..., outputs...] at `adapter_ids` [batch].

    The thin matrices are gathered for every row, and rows are multiplied by them as a batch: as many FLOPs as for one
    adapter, in any order of rows and under any sharding of them. A row reads nothing of other adapters.
    """
    batch, sequence = x.shape[:2]
    thin = jnp.take(weights, adapter_ids, axis=0).reshape(batch, math.prod(x.shape[2:]), -1)
    return (x.reshape(batch, sequence, -1) @ thin).reshape(batch, sequence, *weights.shape[1 + inputs :])


def ragged_product(x: jax.Array, weights: jax.Array, adapter_ids: jax.Array, *, inputs: int) -> jax.Array:
    """The same as a grouped product of tokens, for rows sorted by adapter (`adapter_ids` ascends).

    On a CPU `jax.lax.ragged_dot` multiplies all tokens by every adapter's matrix and masks with zeros: adapters times
    the FLOPs and the memory. NaN times zero is NaN: there an adapter that diverged spoils all others.
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
    scaled = narrow * jnp.take(scale, ctx.adapter_ids, axis=0)[:, None]
    return base.add_bias(base.multiply(x, ctx) + ctx.adapter_product(scaled, b, ctx.adapter_ids, inputs=1))


MULTI_LORA = dataclasses.replace(LORA, apply=apply)


def adapter_inserter(model: ModelConfig, adapters: Mapping[str, AdapterConfig]) -> Callable[[Decoder], None]:
    """Make a function that inserts all adapters, with leaves of zeros, into a decoder.

    Raises UserError as `find_adapted_modules`, and names the adapter.
    """
    for name, adapter in adapters.items():
        try:
            find_adapted_modules(model, adapter)
        except UserError as error:
            raise UserError(f"adapters.{name}: {error}") from None
    wide = widest_adapter(adapters)

    def insert(decoder: Decoder) -> None:
        for module in find_adapted_modules(model, wide):
            linear = attach.submodule(decoder, module.path)
            shapes = leaf_shapes(module, wide, linear.kernel[...])
            zeros = {name: jnp.zeros((like.shape[0], len(adapters), *like.shape[1:])) for name, like in shapes.items()}
            linear.adapter = attach.make_adapter(module, MULTI_LORA, zeros, dropout_rate=wide.dropout)

    return insert


def leaf_shapes(module: AdaptedModule, adapter: AdapterConfig, kernels: Any) -> Leaves:
    """Shapes and dtypes of the leaves of one adapter beside a stack of kernels."""
    return jax.eval_shape(partial(attach.init_adapter, module, adapter), kernels, jax.random.key(0))[1]


def init_adapters(weights: Params, model: ModelConfig, adapters: Mapping[str, AdapterConfig], key: jax.Array) -> Params:
    """`weights` with the leaves of all adapters, each as in a run of its own before the first step. Pure."""
    trees = [attach.init_adapters(weights, model, adapter, key) for adapter in adapters.values()]
    result, wide = attach.copy_dicts(weights), widest_adapter(adapters)
    for module in find_adapted_modules(model, wide):
        linear = attach.subtree(result, module.path)
        per_adapter = [attach.subtree(tree, module.path).get("adapter", {}) for tree in trees]
        linear["adapter"] = {
            name: jnp.stack([pad_with_zeros(leaves.get(name), like) for leaves in per_adapter], axis=1)
            for name, like in leaf_shapes(module, wide, linear["kernel"]).items()
        }
    return result


def pad_with_zeros(leaf: jax.Array | None, like: Any) -> jax.Array:
    """`leaf` padded with zeros to the shape of `like`; None: zeros only."""
    zeros = jnp.zeros(like.shape, like.dtype)
    return zeros if leaf is None else zeros.at[tuple(map(slice, leaf.shape))].set(leaf)


def split_trained(tree: Params, model: ModelConfig, adapters: Mapping[str, AdapterConfig]) -> tuple[Params, Params]:
    """(the trained leaves, [adapters, layers, ...]; all others, as `init_adapters` returns them)."""
    params, frozen = attach.split_trained(tree, model, widest_adapter(adapters))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), params), frozen


def to_decoder_order(params: Params) -> Params:
    """The trained leaves as the decoder reads them: [layers, adapters, ...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), params)


def slice_adapter(leaf: jax.Array, like: Any, *, adapter_id: int, axis: int) -> jax.Array:
    """The part of `leaf` of one adapter along `axis`, cut to the shape of `like`, which has no padding."""
    return jnp.take(leaf, adapter_id, axis=axis)[tuple(map(slice, like.shape))]
