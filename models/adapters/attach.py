"""Adapters put into a model: into its structure, into its parameters, and out of them again.

    graph(model, attached(model, adapter))                        the structure, with an adapter beside each kernel
    tree = started(weights, model, adapter, key)                  the parameters, leaves beside each kernel
    params, frozen = split(tree, model, adapter)                  what learns and what does not
    weights = merged(tree, model, adapter)                        the plain model that computes the same

Merging leaves what it is given alone: to unmerge is to go on with that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Decoder, Params, initial_params
from ..logical_axes import axis_names
from .adapted_modules import Site, linear_maps, sites
from .interface import Adapter, Addition, Inside, Leaves, Method, Setting
from .registry import ADDITIONS, METHODS
from .selection import trained
from .vera import Shared, shared

CUT_BY_TENSOR = ("heads", "kv_heads", "mlp")  # dimensions of kernels that activations have too


def attached(model: ModelConfig, adapter: AdapterConfig | None) -> Callable[[Decoder], None]:
    """A function that puts the adapters, with leaves of zeros, into a decoder. Raises as `sites`."""
    found = sites(model, adapter) if adapter is not None and adapter.method in METHODS else []

    def put(decoder: Decoder) -> None:
        for site in found:
            linear = linear_at(decoder, site)
            leaves = jax.eval_shape(partial(start_site, site, adapter), linear.kernel[...], jax.random.key(0))[1]
            zeros = {leaf: jnp.zeros(like.shape, like.dtype) for leaf, like in leaves.items()}
            linear.adapter = beside(site, METHODS[adapter.method], zeros, rate=adapter.dropout)
        if found and adapter.method == "vera":
            decoder.adapter = Shared(**pair(model, adapter, jax.random.key(0)))
        for addition in () if adapter is None else ADDITIONS.get(adapter.method, ()):
            add(decoder, addition, jax.eval_shape(partial(fresh_addition, addition, model, adapter)))
            decoder.ahead += adapter.length if addition.ahead else 0

    return put


def linear_at(decoder: Decoder, site: Site) -> Any:
    """The stack of linear maps in the decoder."""
    _, segment, place, _, part, name = site.path.split("/")
    return getattr(getattr(decoder.segments[segment][place].block, part), name)


def beside(site: Site, method: Method, leaves: Leaves, *, rate: float) -> Adapter:
    """The module of `leaves` beside the kernels of a stack."""
    names = tuple(axis if axis in CUT_BY_TENSOR else None for axis in axis_names(f"{site.path}/kernel"))
    return Adapter(method, leaves, rate=rate, number=site.number, names=names)


def fresh_addition(addition: Addition, model: ModelConfig, adapter: AdapterConfig) -> dict[str, Leaves]:
    """What is added to some weights of the model: paths and shapes are those for any."""
    key = jax.random.key(0)
    return addition.start(initial_params(model, key), model, adapter, key)


def add(decoder: Decoder, addition: Addition, shapes: dict[str, Leaves]) -> None:
    """Put modules with leaves of zeros into the decoder."""
    for path, leaves in shapes.items():
        *parents, last = path.split("/")
        place = decoder
        for name in parents:
            place = place[name] if isinstance(place, nnx.Dict) else getattr(place, name)
        zeros = {name: jnp.zeros(like.shape, like.dtype) for name, like in leaves.items()}
        setattr(place, last, addition.module(zeros))


Read = Callable[[jax.Array, tuple[int, ...], tuple[int, ...]], jax.Array]


def as_it_is(kernel: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
    """A kernel that will not be quantized."""
    del inputs, outputs
    return kernel


def started(
    weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array, *, read: Read = as_it_is
) -> Params:
    """`weights` with the adapters' leaves as they are before the first step; float32, whatever the weights are.

    Pure, to be traced. Some starts take from the kernels what they put into the leaves. `read(kernel, inputs, outputs)`
    is a layer's kernel as it will be once it is quantized.
    """
    tree = copied(weights)
    for addition in ADDITIONS.get(adapter.method, ()):
        for path, leaves in addition.start(weights, model, adapter, key).items():
            parent, _, last = path.rpartition("/")
            (at(tree, parent) if parent else tree)[last] = leaves
    if adapter.method not in METHODS:
        return tree
    for number, site in enumerate(sites(model, adapter)):
        linear = at(tree, site.path)
        kernel, leaves = start_site(site, adapter, linear["kernel"], jax.random.fold_in(key, number), read=read)
        linear["kernel"], linear["adapter"] = kernel, leaves
    if adapter.method == "vera":
        tree["adapter"] = pair(model, adapter, key)
    return tree


def start_site(
    site: Site, adapter: AdapterConfig, kernels: jax.Array, key: jax.Array, *, read: Read = as_it_is
) -> tuple[jax.Array, Leaves]:
    """(kernels, leaves) of a stack, each layer by itself."""
    own = partial(read, inputs=site.inputs, outputs=site.outputs)
    start = METHODS[adapter.method].starts[adapter.start]

    def layer(key: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[jax.Array, Leaves]:
        setting = Setting(
            site.inputs,
            site.outputs,
            scale,
            scales_input=site.path.endswith("mlp/down"),
            rank=adapter.rank,
            block=adapter.block,
            read=own,
        )
        return start(key, kernel, setting)

    return jax.vmap(layer)(jax.random.split(key, len(site.modules)), kernels, jnp.asarray(site.scale))


def pair(model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, jax.Array]:
    """VeRA's shared pair, as wide as the widest map of the model."""
    widths = [(int(np.prod(ins)), int(np.prod(outs))) for ins, outs in linear_maps(model).values()]
    inputs, outputs = (max(sizes) for sizes in zip(*widths, strict=True))
    return shared(jax.random.fold_in(key, 1 << 20), inputs=inputs, outputs=outputs, rank=adapter.rank)


def split(tree: Params, model: ModelConfig, adapter: AdapterConfig | None) -> tuple[Params, Params]:
    """(what learns, all the rest) as two nested dicts; everything learns without an adapter."""
    if adapter is None:
        return tree, {}
    leaves = flat(tree)
    chosen = trained(list(leaves), model, adapter)
    return (
        nested({path: leaf for path, leaf in leaves.items() if path in chosen}),
        nested({path: leaf for path, leaf in leaves.items() if path not in chosen}),
    )


def merged(tree: Params, model: ModelConfig, adapter: AdapterConfig | None) -> Params:
    """The weights of the plain model that computes what `tree` does; `tree` itself where nothing was added to it.

    Raises UserError where no plain model does.
    """
    if adapter is not None and adapter.method in ADDITIONS:
        addition, *more = ADDITIONS[adapter.method]
        if more or addition.merge is None:
            raise UserError(
                f"adapter.method: {adapter.method} cannot be merged, no weight of the model can hold what it adds; "
                "keep the run, or, where PEFT has the method, use `meshwright adapter export`"
            )
        return addition.merge(tree, adapter)
    if adapter is None or adapter.method not in METHODS:
        return tree
    result = copied({name: part for name, part in tree.items() if name != "adapter"})
    for site in sites(model, adapter):
        linear = at(result, site.path)
        leaves = linear.pop("adapter")
        # Leaves of the shared pair have no layers: they are the same for all.
        layer = partial(merge_layer, METHODS[adapter.method].merge, tree.get("adapter", {}), len(site.inputs))
        linear |= jax.vmap(layer)(leaves, {key: linear[key] for key in ("kernel", "bias") if key in linear})
    return result


def merge_layer(
    merge: Callable[[Leaves, Inside], Inside], common: Leaves, inputs: int, leaves: Leaves, linear: Leaves
) -> Leaves:
    """Kernel and bias of one layer, the adapter in them; computed in float32, returned as they were."""
    wide = {name: array.astype(jnp.float32) for name, array in linear.items()}
    done = merge(common | leaves, Inside(wide["kernel"], wide.get("bias"), inputs))
    found = {"kernel": done.kernel} | ({} if done.bias is None else {"bias": done.bias})
    return {name: array.astype(linear[name].dtype) for name, array in found.items()}


def copied(tree: Params) -> Params:
    """The nested dicts anew, with the same leaves."""
    return {key: copied(part) if isinstance(part, dict) else part for key, part in tree.items()}


def at(tree: Params, path: str) -> Any:
    """What stands at `a/b/c`."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def flat(tree: Params) -> dict[str, Any]:
    """Path -> leaf."""
    return flatten_dict(tree, sep="/")


def nested(leaves: dict[str, Any]) -> Params:
    """The inverse of `flat`."""
    return unflatten_dict(leaves, sep="/")
