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
from .adapted_modules import AdaptedModule, find_adapted_modules, linear_maps
from .interface import Adapter, AddedModule, BaseLinear, InitContext, Leaves, LinearMethod
from .registry import ADDED_MODULES, LINEAR_METHODS
from .selection import trained_masks
from .vera import SharedMatrices, draw_shared_matrices

CUT_BY_TENSOR = ("heads", "kv_heads", "mlp")  # dimensions of kernels that activations have too


def adapter_inserter(model: ModelConfig, adapter: AdapterConfig | None) -> Callable[[Decoder], None]:
    """A function that puts the adapters, with leaves of zeros, into a decoder. Raises as `sites`."""
    found = find_adapted_modules(model, adapter) if adapter is not None and adapter.method in LINEAR_METHODS else []

    def put(decoder: Decoder) -> None:
        for site in found:
            linear = get_linear(decoder, site)
            leaves = jax.eval_shape(partial(init_adapter, site, adapter), linear.kernel[...], jax.random.key(0))[1]
            zeros = {leaf: jnp.zeros(like.shape, like.dtype) for leaf, like in leaves.items()}
            linear.adapter = make_adapter(site, LINEAR_METHODS[adapter.method], zeros, rate=adapter.dropout)
        if found and adapter.method == "vera":
            decoder.adapter = SharedMatrices(**init_shared_matrices(model, adapter, jax.random.key(0)))
        for addition in () if adapter is None else ADDED_MODULES.get(adapter.method, ()):
            insert_module(decoder, addition, jax.eval_shape(partial(added_leaves, addition, model, adapter)))
            decoder.is_prefix += adapter.length if addition.is_prefix else 0

    return put


def get_linear(decoder: Decoder, module: AdaptedModule) -> Any:
    """The stack of linear maps in the decoder."""
    _, segment, place, _, part, name = module.path.split("/")
    return getattr(getattr(decoder.segments[segment][place].block, part), name)


def make_adapter(module: AdaptedModule, method: LinearMethod, leaves: Leaves, *, rate: float) -> Adapter:
    """The module of `leaves` beside the kernels of a stack."""
    names = tuple(axis if axis in CUT_BY_TENSOR else None for axis in axis_names(f"{module.path}/kernel"))
    return Adapter(method, leaves, rate=rate, number=module.map_index, names=names)


def added_leaves(addition: AddedModule, model: ModelConfig, adapter: AdapterConfig) -> dict[str, Leaves]:
    """What is added to some weights of the model: paths and shapes are those for any."""
    key = jax.random.key(0)
    return addition.init(initial_params(model, key), model, adapter, key)


def insert_module(decoder: Decoder, addition: AddedModule, shapes: dict[str, Leaves]) -> None:
    """Put modules with leaves of zeros into the decoder."""
    for path, leaves in shapes.items():
        *parents, last = path.split("/")
        place = decoder
        for name in parents:
            place = place[name] if isinstance(place, nnx.Dict) else getattr(place, name)
        zeros = {name: jnp.zeros(like.shape, like.dtype) for name, like in leaves.items()}
        setattr(place, last, addition.make_module(zeros))


FakeQuantize = Callable[[jax.Array, tuple[int, ...], tuple[int, ...]], jax.Array]


def unquantized(kernel: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
    """A kernel that will not be quantized."""
    del inputs, outputs
    return kernel


def init_adapters(
    weights: Params,
    model: ModelConfig,
    adapter: AdapterConfig,
    key: jax.Array,
    *,
    fake_quantize: FakeQuantize = unquantized,
) -> Params:
    """`weights` with the adapters' leaves as they are before the first step; float32, whatever the weights are.

    Pure, to be traced. Some starts take from the kernels what they put into the leaves. `read(kernel, inputs, outputs)`
    is a layer's kernel as it will be once it is quantized.
    """
    tree = copy_dicts(weights)
    for addition in ADDED_MODULES.get(adapter.method, ()):
        for path, leaves in addition.init(weights, model, adapter, key).items():
            parent, _, last = path.rpartition("/")
            (subtree(tree, parent) if parent else tree)[last] = leaves
    if adapter.method not in LINEAR_METHODS:
        return tree
    for number, site in enumerate(find_adapted_modules(model, adapter)):
        linear = subtree(tree, site.path)
        kernel, leaves = init_adapter(
            site, adapter, linear["kernel"], jax.random.fold_in(key, number), fake_quantize=fake_quantize
        )
        linear["kernel"], linear["adapter"] = kernel, leaves
    if adapter.method == "vera":
        tree["adapter"] = init_shared_matrices(model, adapter, key)
    return tree


def init_adapter(
    module: AdaptedModule,
    adapter: AdapterConfig,
    kernels: jax.Array,
    key: jax.Array,
    *,
    fake_quantize: FakeQuantize = unquantized,
) -> tuple[jax.Array, Leaves]:
    """(kernels, leaves) of a stack, each layer by itself."""
    own = partial(fake_quantize, inputs=module.inputs, outputs=module.outputs)
    start = LINEAR_METHODS[adapter.method].initializers[adapter.start]

    def layer(key: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[jax.Array, Leaves]:
        setting = InitContext(
            module.inputs,
            module.outputs,
            scale,
            is_down_projection=module.path.endswith("mlp/down"),
            rank=adapter.rank,
            block=adapter.block,
            fake_quantize=own,
        )
        return start(key, kernel, setting)

    return jax.vmap(layer)(jax.random.split(key, len(module.layer_names)), kernels, jnp.asarray(module.scale))


def init_shared_matrices(model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, jax.Array]:
    """VeRA's shared pair, as wide as the widest map of the model."""
    widths = [(int(np.prod(ins)), int(np.prod(outs))) for ins, outs in linear_maps(model).values()]
    inputs, outputs = (max(sizes) for sizes in zip(*widths, strict=True))
    return draw_shared_matrices(jax.random.fold_in(key, 1 << 20), inputs=inputs, outputs=outputs, rank=adapter.rank)


def split_trained(tree: Params, model: ModelConfig, adapter: AdapterConfig | None) -> tuple[Params, Params]:
    """(what learns, all the rest) as two nested dicts; everything learns without an adapter."""
    if adapter is None:
        return tree, {}
    leaves = flatten(tree)
    chosen = trained_masks(list(leaves), model, adapter)
    return (
        unflatten({path: leaf for path, leaf in leaves.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in leaves.items() if path not in chosen}),
    )


def merge_adapters(tree: Params, model: ModelConfig, adapter: AdapterConfig | None) -> Params:
    """The weights of the plain model that computes what `tree` does; `tree` itself where nothing was added to it.

    Raises UserError where no plain model does.
    """
    if adapter is not None and adapter.method in ADDED_MODULES:
        addition, *more = ADDED_MODULES[adapter.method]
        if more or addition.merge is None:
            raise UserError(
                f"adapter.method: {adapter.method} cannot be merged, no weight of the model can hold what it adds; "
                "keep the run, or, where PEFT has the method, use `meshwright adapter export`"
            )
        return addition.merge(tree, adapter)
    if adapter is None or adapter.method not in LINEAR_METHODS:
        return tree
    result = copy_dicts({name: part for name, part in tree.items() if name != "adapter"})
    for site in find_adapted_modules(model, adapter):
        linear = subtree(result, site.path)
        leaves = linear.pop("adapter")
        # Leaves of the shared pair have no layers: they are the same for all.
        layer = partial(merge_layer, LINEAR_METHODS[adapter.method].merge, tree.get("adapter", {}), len(site.inputs))
        linear |= jax.vmap(layer)(leaves, {key: linear[key] for key in ("kernel", "bias") if key in linear})
    return result


def merge_layer(
    merge: Callable[[Leaves, BaseLinear], BaseLinear], common: Leaves, inputs: int, leaves: Leaves, linear: Leaves
) -> Leaves:
    """Kernel and bias of one layer, the adapter in them; computed in float32, returned as they were."""
    wide = {name: array.astype(jnp.float32) for name, array in linear.items()}
    done = merge(common | leaves, BaseLinear(wide["kernel"], wide.get("bias"), inputs))
    found = {"kernel": done.kernel} | ({} if done.bias is None else {"bias": done.bias})
    return {name: array.astype(linear[name].dtype) for name, array in found.items()}


def copy_dicts(tree: Params) -> Params:
    """The nested dicts anew, with the same leaves."""
    return {key: copy_dicts(part) if isinstance(part, dict) else part for key, part in tree.items()}


def subtree(tree: Params, path: str) -> Any:
    """What stands at `a/b/c`."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def flatten(tree: Params) -> dict[str, Any]:
    """Path -> leaf."""
    return flatten_dict(tree, sep="/")


def unflatten(leaves: dict[str, Any]) -> Params:
    """The inverse of `flat`."""
    return unflatten_dict(leaves, sep="/")
