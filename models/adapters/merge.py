"""Adapters merged into the kernels beside them.

    weights = merge_adapters(tree, model, adapter)      the plain model that computes the same

Merging does not change its argument: to unmerge, go on with that.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Params
from .adapted_modules import find_adapted_modules
from .attach import copy_dicts, subtree
from .interface import BaseLinear, Leaves
from .registry import ADDED_MODULES, LINEAR_METHODS


def merge_adapters(tree: Params, model: ModelConfig, adapter: AdapterConfig | None) -> Params:
    """The weights of the plain model that computes what `tree` computes; `tree` itself where nothing was added.

    Raises UserError where no plain model computes the same.
    """
    if adapter is not None and adapter.method in ADDED_MODULES:
        added_module, *more = ADDED_MODULES[adapter.method]
        if more or added_module.merge is None:
            raise UserError(
                f"adapter.method: {adapter.method} cannot be merged, because no weight of the model can hold what it "
                "adds; keep the run, or use `meshwright adapter export` where PEFT has the method"
            )
        return added_module.merge(tree, adapter)
    if adapter is None or adapter.method not in LINEAR_METHODS:
        return tree
    result = copy_dicts({name: part for name, part in tree.items() if name != "adapter"})
    for module in find_adapted_modules(model, adapter):
        linear = subtree(result, module.path)
        leaves = linear.pop("adapter")
        # The shared matrices of VeRA have no dimension of layers: all layers read the same.
        merge = LINEAR_METHODS[adapter.method].merge
        merge_stack = jax.vmap(partial(merge_layer, merge, tree.get("adapter", {}), len(module.inputs)))
        linear |= merge_stack(leaves, {key: linear[key] for key in ("kernel", "bias") if key in linear})
    return result


def merge_layer(
    merge: Callable[[Leaves, BaseLinear], BaseLinear],
    shared_matrices: Leaves,
    inputs: int,
    leaves: Leaves,
    linear: Leaves,
) -> Leaves:
    """Kernel and bias of one layer with its adapter merged; computed in float32, returned in their own dtypes."""
    wide = {name: array.astype(jnp.float32) for name, array in linear.items()}
    merged = merge(shared_matrices | leaves, BaseLinear(wide["kernel"], wide.get("bias"), inputs))
    arrays = {"kernel": merged.kernel} | ({} if merged.bias is None else {"bias": merged.bias})
    return {name: array.astype(linear[name].dtype) for name, array in arrays.items()}
