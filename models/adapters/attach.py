"""Adapters put into a model: into its structure and into its parameters. `merge.py` puts them out again.

decoder_graphdef(model, adapter_inserter(model, adapter))        the structure, with an adapter beside each kernel
tree = init_adapters(weights, model, adapter, key)               the parameters, with leaves beside each kernel
params, frozen = split_trained(tree, model, adapter)             what is trained and what is not
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Decoder, Params, initial_params
from ..logical_axes import axis_names
from .adapted_modules import AdaptedModule, find_adapted_modules, linear_maps
from .interface import Adapter, AddedModule, InitContext, Leaves, LinearMethod
from .registry import ADDED_MODULES, LINEAR_METHODS
from .selection import trained_masks
from .vera import SharedMatrices, draw_shared_matrices

CUT_BY_TENSOR = ("heads", "kv_heads", "mlp")  # logical axes that kernels and activations have in common


def adapter_inserter(model: ModelConfig, adapter: AdapterConfig | None) -> Callable[[Decoder], None]:
    """Make a function that inserts the adapters, with leaves of zeros, into a decoder.

    Raises UserError as `find_adapted_modules`.
    """
    modules = find_adapted_modules(model, adapter) if adapter is not None and adapter.method in LINEAR_METHODS else []

    def insert(decoder: Decoder) -> None:
        for module in modules:
            linear = submodule(decoder, module.path)
            leaves = jax.eval_shape(partial(init_adapter, module, adapter), linear.kernel[...], jax.random.key(0))[1]
            zeros = jax.tree.map(jnp.zeros_like, leaves)
            linear.adapter = make_adapter(module, LINEAR_METHODS[adapter.method], zeros, dropout_rate=adapter.dropout)
        if modules and adapter.method == "vera":
            decoder.adapter = SharedMatrices(**init_shared_matrices(model, adapter, jax.random.key(0)))
        for added_module in () if adapter is None else ADDED_MODULES.get(adapter.method, ()):
            for path, leaves in jax.eval_shape(partial(added_leaves, added_module, model, adapter)).items():
                parent, _, name = path.rpartition("/")
                setattr(
                    submodule(decoder, parent), name, added_module.make_module(jax.tree.map(jnp.zeros_like, leaves))
                )
            decoder.prefix_length += adapter.length if added_module.is_prefix else 0

    return insert


def submodule(decoder: Decoder, path: str) -> Any:
    """The module at `a/b/c` of the decoder; the decoder itself at an empty path."""
    module = decoder
    for name in path.split("/") if path else ():
        module = module[name] if isinstance(module, nnx.Dict) else getattr(module, name)
    return module


def make_adapter(module: AdaptedModule, method: LinearMethod, leaves: Leaves, *, dropout_rate: float) -> Adapter:
    """The NNX module of `leaves` beside the kernels of a stack."""
    axes = tuple(axis if axis in CUT_BY_TENSOR else None for axis in axis_names(f"{module.path}/kernel"))
    return Adapter(method, leaves, dropout_rate=dropout_rate, map_index=module.map_index, kernel_axes=axes)


def added_leaves(added_module: AddedModule, model: ModelConfig, adapter: AdapterConfig) -> dict[str, Leaves]:
    """The leaves that are added to weights drawn with key 0; the paths and shapes are the same for all weights."""
    key = jax.random.key(0)
    return added_module.init(initial_params(model, key), model, adapter, key)


FakeQuantize = Callable[[jax.Array, tuple[int, ...], tuple[int, ...]], jax.Array]


def no_fake_quantize(kernel: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
    """`kernel` itself: the `fake_quantize` of a run without quantization."""
    del inputs, outputs
    return kernel


def init_adapters(
    weights: Params,
    model: ModelConfig,
    adapter: AdapterConfig,
    key: jax.Array,
    *,
    fake_quantize: FakeQuantize = no_fake_quantize,
) -> Params:
    """`weights` with the adapters' leaves before the first step; float32, whatever the weights are. Pure.

    Some initializers move a part of the kernel into the leaves. `fake_quantize(kernel, inputs, outputs)` is a layer's
    kernel as it reads once it is quantized.
    """
    tree = copy_dicts(weights)
    for added_module in ADDED_MODULES.get(adapter.method, ()):
        for path, leaves in added_module.init(weights, model, adapter, key).items():
            parent, _, name = path.rpartition("/")
            (subtree(tree, parent) if parent else tree)[name] = leaves
    if adapter.method not in LINEAR_METHODS:
        return tree
    for number, module in enumerate(find_adapted_modules(model, adapter)):
        linear, module_key = subtree(tree, module.path), jax.random.fold_in(key, number)
        linear["kernel"], linear["adapter"] = init_adapter(
            module, adapter, linear["kernel"], module_key, fake_quantize=fake_quantize
        )
    if adapter.method == "vera":
        tree["adapter"] = init_shared_matrices(model, adapter, key)
    return tree


def init_adapter(
    module: AdaptedModule,
    adapter: AdapterConfig,
    kernels: jax.Array,
    key: jax.Array,
    *,
    fake_quantize: FakeQuantize = no_fake_quantize,
) -> tuple[jax.Array, Leaves]:
    """(kernels, leaves) of a stack before the first step; each layer is initialized by itself."""
    init = LINEAR_METHODS[adapter.method].initializers[adapter.start]

    def init_layer(key: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[jax.Array, Leaves]:
        context = InitContext(
            module.inputs,
            module.outputs,
            scale,
            is_down_projection=module.path.endswith("mlp/down"),
            rank=adapter.rank,
            block=adapter.block,
            fake_quantize=partial(fake_quantize, inputs=module.inputs, outputs=module.outputs),
        )
        return init(key, kernel, context)

    return jax.vmap(init_layer)(jax.random.split(key, len(module.layer_names)), kernels, jnp.asarray(module.scale))


def init_shared_matrices(model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, jax.Array]:
    """The pair of matrices that all layers share in VeRA, as wide as the widest linear map of the model."""
    widths = [(int(np.prod(inputs)), int(np.prod(outputs))) for inputs, outputs in linear_maps(model).values()]
    inputs, outputs = (max(sizes) for sizes in zip(*widths, strict=True))
    return draw_shared_matrices(jax.random.fold_in(key, 1 << 20), inputs=inputs, outputs=outputs, rank=adapter.rank)


def split_trained(tree: Params, model: ModelConfig, adapter: AdapterConfig | None) -> tuple[Params, Params]:
    """(the trained leaves, all others) as two nested dicts; without an adapter everything is trained."""
    if adapter is None:
        return tree, {}
    leaves = flatten(tree)
    trained = trained_masks(list(leaves), model, adapter)
    return (
        unflatten({path: leaf for path, leaf in leaves.items() if path in trained}),
        unflatten({path: leaf for path, leaf in leaves.items() if path not in trained}),
    )


def copy_dicts(tree: Params) -> Params:
    """A copy of the nested dicts that holds the same leaves."""
    return {key: copy_dicts(part) if isinstance(part, dict) else part for key, part in tree.items()}


def subtree(tree: Params, path: str) -> Any:
    """The part of the nested dicts at `a/b/c`."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}."""
    return flatten_dict(tree, sep="/")


def unflatten(leaves: dict[str, Any]) -> Params:
    """{"a/b/c": leaf} -> nested dicts."""
    return unflatten_dict(leaves, sep="/")
